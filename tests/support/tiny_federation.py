"""Federations of tiny random models on random token sequences, built from the library's own parts; no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from sfedlora.data.encoded import EncodedData
from sfedlora.data.partition import ClientSplit
from sfedlora.federation.client import LocalTraining, TrainingSetup
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.initialize import Initialization, form_initial_a
from sfedlora.federation.objective import Task
from sfedlora.federation.round import RoundFinished, run_rounds
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.state import Federation, FederationState, RoundSettings, initial_state
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.scaling import ScalingRule, scaling_factor
from sfedlora.methods import Method, client_weights, make_method
from sfedlora.types import LoraSize, LoraSizes, Part
from support.tiny_models import VOCAB_SIZE, tiny_bert_classifier, tiny_llama

__all__ = [
    "CAUSAL_TARGETS",
    "CLASSIFIER_TARGETS",
    "PAD",
    "ROUNDS",
    "TRAINING",
    "Ran",
    "adapted",
    "random_classes",
    "random_text",
    "run_all",
    "splits_of",
    "tiny_federation",
]

PAD = 0
CAUSAL_TARGETS, CLASSIFIER_TARGETS = ("q_proj", "v_proj", "down_proj"), ("query", "value")
TRAINING = LocalTraining(
    optimizer="sgd",
    learning_rate_a_ratio=1.0,
    weight_decay=0.0,
    batch_size=4,
    accumulation=1,
    local_steps=3,
    local_epochs=None,
    max_grad_norm=None,
    keep_optimizer_state=False,
)
ROUNDS = RoundSettings(
    num_rounds=2,
    cohort_size=None,
    weighting="examples",
    learning_rate=0.05,
    schedule="constant",
    warmup_rounds=0,
    evaluate_every=1,
    evaluated="all",
)


@dataclass(frozen=True)
class Ran:
    """The states of a federation, `states[0]` before round 1, and the metrics lines, `records[0]` of round 1."""

    states: tuple[FederationState, ...]
    records: tuple[Mapping[str, Any], ...]


def random_text(num_examples: int, *, seed: int = 0) -> EncodedData:
    """Token sequences of 4 to 11 tokens; labels from a random position on."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 12, size=num_examples)
    return EncodedData(
        tokens=rng.integers(3, VOCAB_SIZE, size=int(lengths.sum()), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        label_starts=rng.integers(1, lengths - 1, dtype=np.int32),
    )


def random_classes(num_examples: int, *, num_labels: int = 3, seed: int = 0) -> EncodedData:
    """Token sequences of 4 to 11 tokens with a class each."""
    text = random_text(num_examples, seed=seed)
    labels = np.random.default_rng([seed, 1]).integers(0, num_labels, size=num_examples)
    return EncodedData(text.tokens, text.offsets, labels=labels.astype(np.int64))


def splits_of(sizes: Mapping[str, int], *, held_out: int = 3) -> dict[str, ClientSplit]:
    """Consecutive examples: `sizes[client]` to train on, `held_out` each for validation and test."""
    splits, start = {}, 0
    for client_id, size in sizes.items():
        ends = [start + size, start + size + held_out, start + size + 2 * held_out]
        splits[client_id] = ClientSplit(
            tuple(range(start, ends[0])), tuple(range(ends[0], ends[1])), tuple(range(ends[1], ends[2]))
        )
        start = ends[2]
    return splits


def adapted(task: Task = "causal-lm", *, rank: int = 4, dropout: float = 0.0, seed: int = 0) -> ResidentModel:
    """The tiny Llama, or the tiny BERT with its head trained; `dropout` is that of LoRA and of the head."""
    if task == "causal-lm":
        return adapt(tiny_llama(seed), target_modules=CAUSAL_TARGETS, rank=rank, dropout=dropout)
    model: PreTrainedModel = tiny_bert_classifier(seed)
    model.dropout.p = dropout
    return adapt(model, target_modules=CLASSIFIER_TARGETS, rank=rank, dropout=dropout, head_modules=("classifier",))


def tiny_federation(
    *,
    method: str | Method = "fedsa",
    head: Literal["auto", "personal", "shared"] = "auto",
    task: Task = "causal-lm",
    sizes: Mapping[str, int] | None = None,
    training: LocalTraining = TRAINING,
    rounds: RoundSettings = ROUNDS,
    init: Initialization = "independent",
    rule: ScalingRule = "sfed",
    alpha: float = 8.0,
    rank: int = 4,
    dropout: float = 0.0,
    seed: int = 0,
) -> Federation:
    """A federation of clients `a` to `d` (or `sizes`), as `setup.prepare` would build it."""
    clients = {"a": 9, "b": 14, "c": 6, "d": 11} if sizes is None else sizes
    splits = splits_of(clients)
    num_examples = sum(clients.values()) + 6 * len(clients)
    data = random_text(num_examples) if task == "causal-lm" else random_classes(num_examples)
    resident = adapted(task, rank=rank, dropout=dropout)
    weights = client_weights(clients, rounds.weighting)
    initial = form_initial_a(resident.layout, rank, weights=weights, init=init, seed=seed)
    chosen = make_method(method, head) if isinstance(method, str) else method
    return Federation(
        resident=resident,
        runner=SerialRunner(TrainingSetup(resident, data, training, task, PAD, seed)),
        method=chosen,
        data=data,
        splits=splits,
        participants={client_id: split.train for client_id, split in splits.items()},
        external={},
        initial={**resident.read([Part.A, Part.B, Part.HEAD]), **initial.tensors},
        init=init,
        sizes=LoraSizes(
            LoraSize(rank, scaling_factor(rule, alpha=alpha, rank=rank, num_clients=initial.effective_clients))
        ),
        effective_clients=initial.effective_clients,
        task=task,
        pad_token_id=PAD,
        batching=EvalBatching(4, 64),
        rounds=rounds,
        seed=seed,
    )


def run_all(federation: Federation) -> Ran:
    """Run every round."""
    states, records = [initial_state(federation)], []
    for event in run_rounds(federation, states[0]):
        if isinstance(event, RoundFinished):
            states.append(event.state)
            records.append(event.record)
    return Ran(tuple(states), tuple(records))
