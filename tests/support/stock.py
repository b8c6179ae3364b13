"""What stock PEFT and transformers make of a run directory, without any of our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

__all__ = [
    "causal_model",
    "class_loss",
    "classifier",
    "logits_of",
    "plain_encoding",
    "response_loss",
    "rows_of",
    "tokenizer_of",
]


def causal_model(adapter: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Base model, as the adapter's own config names it, with the adapter."""
    model = AutoModelForCausalLM.from_pretrained(_base_of(adapter), dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def classifier(adapter: Path, num_labels: int) -> PreTrainedModel:
    """As `causal_model`, a classifier with the head of the adapter."""
    model = AutoModelForSequenceClassification.from_pretrained(_base_of(adapter), num_labels=num_labels)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def tokenizer_of(adapter: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_base_of(adapter))


def _base_of(adapter: Path) -> str:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return str(config["base_model_name_or_path"])


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: list[list[int]]) -> list[Tensor]:
    """The logits of each example by itself, so without padding."""
    return [model(torch.tensor([ids])).logits[0] for ids in inputs]


def class_loss(logits: list[Tensor], labels: list[int]) -> float:
    """Mean cross entropy over examples in float64."""
    scores = torch.log_softmax(torch.stack(logits).double(), dim=-1)
    return -float(scores[torch.arange(len(labels)), torch.tensor(labels)].mean())


def rows_of(source: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, from 0 in file order."""
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]


def plain_encoding(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], int]:
    """Token ids of `prompt newline response end`, and how many of them belong to the response.

    The start of the prompt is cut first (its last token stays), then the end of the response.
    """
    prompt = tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"]
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    first = tokenizer("a")["input_ids"][0]
    prompt = ([first] if first == tokenizer.bos_token_id else []) + prompt
    surplus = max(0, len(prompt) + len(response) - max_length)
    if surplus:
        assert prompt[0] != tokenizer.bos_token_id, "the oracle only cuts prompts without a begin token"
        prompt = prompt[min(surplus, len(prompt) - 1) :]
        response = response[: max_length - len(prompt)]
    return prompt + response, len(response)


@torch.no_grad()
def response_loss(model: PreTrainedModel, encoded: list[tuple[list[int], int]]) -> float:
    """Mean cross entropy over all response tokens in float64, one example at a time, so without padding."""
    total, count = 0.0, 0
    for ids, num_response in encoded:
        logits: Tensor = model(torch.tensor([ids])).logits[0].double()
        scores = torch.log_softmax(logits, dim=-1)
        for position in range(len(ids) - num_response, len(ids)):
            total -= float(scores[position - 1, ids[position]])
        count += num_response
    return total / count
