"""Clients that differ in everything a stack has to cope with, trained one after the other and side by side.

The oracle of a stack is the same training one client at a time, which `federation.test_client` holds against a plain
loop with stock PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sfedlora.data.encoded import EncodedData
from sfedlora.errors import ClientError
from sfedlora.federation.client import (
    ClientOutcome,
    ClientWork,
    LocalTraining,
    TrainingSetup,
    train_client,
    train_clients,
)
from sfedlora.federation.objective import Task
from sfedlora.lora.inject import ResidentModel
from sfedlora.types import LoraSize, Part, Tensors, part_of
from support.tiny_federation import PAD
from support.tiny_models import VOCAB_SIZE

__all__ = [
    "Clients",
    "assert_like_alone",
    "count_passes",
    "gradients",
    "relative_error",
    "setup_of",
    "stacked",
    "succeeded",
    "work_for",
]


@dataclass(frozen=True)
class Clients:
    """Who is in a stack: for each client its rank, number of examples, and shortest and longest of them."""

    ranks: Sequence[int]
    num_examples: Sequence[int]
    lengths: Sequence[tuple[int, int]]

    @property
    def names(self) -> list[str]:
        return [chr(ord("a") + place) for place in range(len(self.ranks))]

    def rows(self, place: int) -> range:
        start = sum(self.num_examples[:place])
        return range(start, start + self.num_examples[place])

    def data(self, task: Task, *, num_labels: int = 3) -> EncodedData:
        """Random tokens; labels from a random position on, or random classes."""
        rng = np.random.default_rng(5)
        spans = zip(self.num_examples, self.lengths, strict=True)
        lengths = np.concatenate([rng.integers(low, high + 1, size=count) for count, (low, high) in spans])
        classify = task == "sequence-classification"
        return EncodedData(
            tokens=rng.integers(3, VOCAB_SIZE, size=int(lengths.sum()), dtype=np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            label_starts=None if classify else rng.integers(1, lengths - 1, dtype=np.int32),
            labels=rng.integers(0, num_labels, size=len(lengths)) if classify else None,
        )


def setup_of(resident: ResidentModel, clients: Clients, training: LocalTraining, task: Task) -> TrainingSetup:
    return TrainingSetup(resident, clients.data(task), training, task, PAD, 11)


def work_for(
    resident: ResidentModel,
    clients: Clients,
    *,
    learning_rate: float = 0.01,
    scaling: float = 2.0,
    trained: frozenset[Part] = frozenset(Part),
    round_num: int = 1,
) -> list[ClientWork]:
    """Work with A and B away from zero, the heads different, and a gamma for each rank."""
    generator = torch.Generator().manual_seed(3)
    head = resident.read([Part.HEAD])
    works = []
    for place, (name, rank) in enumerate(zip(clients.names, clients.ranks, strict=True)):
        drawn = {
            key: torch.randn(shape, generator=generator) * 0.2 + head.get(key, torch.zeros(()))
            for key, shape in resident.layout.shapes(rank).items()
        }
        size = LoraSize(rank, scaling * rank**-0.5)
        works.append(ClientWork(name, round_num, drawn, trained, size, learning_rate, clients.rows(place), {}))
    return works


def stacked(setup: TrainingSetup, works: Sequence[ClientWork]) -> list[ClientOutcome]:
    """Train side by side; no client may fail."""
    return [succeeded(result) for result in train_clients(setup, works)]


def succeeded(result: ClientOutcome | ClientError) -> ClientOutcome:
    assert isinstance(result, ClientOutcome), result
    return result


def gradients(setup: TrainingSetup, works: Sequence[ClientWork]) -> list[dict[Part, Tensor]]:
    """The gradients that one step of each client leaves, laid out by its own rank; several clients are stacked."""
    one_step = replace(setup, training=replace(setup.training, local_steps=1, local_epochs=None, max_grad_norm=None))
    stacked(one_step, works)
    resident = setup.resident
    return [
        {
            part: resident.cut_to_rank(part, resident.flat_grad(part, slot), slot).clone()
            for part in work.trained
            if resident.flat(part).numel()
        }
        for slot, work in enumerate(works)
    ]


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative L2 error over the parts."""
    assert found.keys() == expected.keys()
    errors: list[float] = []
    for part in {part_of(name) for name in expected}:
        names = [name for name in expected if part_of(name) is part]
        wrong = sum(float((found[name] - expected[name]).double().square().sum()) for name in names)
        size = sum(float(expected[name].double().square().sum()) for name in names)
        errors.append((wrong / size) ** 0.5)
    return max(errors)


def assert_like_alone(
    setup: TrainingSetup, works: Sequence[ClientWork], outcomes: Sequence[ClientOutcome], tolerance: float
) -> None:
    """Each outcome is what the client alone gives: factors and moments to the tolerance, counts exactly."""
    for work, outcome in zip(works, outcomes, strict=True):
        alone = train_client(setup, work)
        assert (outcome.client_id, outcome.round_num, outcome.num_examples) == (
            alone.client_id,
            alone.round_num,
            alone.num_examples,
        )
        assert list(outcome.tensors) == list(alone.tensors)
        assert relative_error(outcome.tensors, alone.tensors) < tolerance, work.client_id
        moved = {name: alone.tensors[name] - work.start[name] for name in alone.tensors}
        assert max(float(tensor.abs().max()) for tensor in moved.values()) > 1e-3, "nothing moved, nothing is compared"
        _assert_same_metrics(outcome, alone, tolerance)
        _assert_same_moments(outcome.optimizer_state, alone.optimizer_state, tolerance)


def _assert_same_metrics(outcome: ClientOutcome, alone: ClientOutcome, tolerance: float) -> None:
    ours, theirs = outcome.metrics, alone.metrics
    assert (ours.num_steps, ours.tokens) == (theirs.num_steps, theirs.tokens)
    assert ours.padded_tokens >= theirs.padded_tokens
    for name in ("train_loss", "grad_norm_a", "grad_norm_b"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found == expected or abs(found - expected) <= 10 * tolerance * abs(expected), name


def _assert_same_moments(found: Tensors, expected: Tensors, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        size = float(torch.linalg.vector_norm(tensor))
        assert float(torch.linalg.vector_norm(found[name] - tensor)) <= 10 * tolerance * size, name


def count_passes(resident: ResidentModel) -> list[tuple[int, ...]]:
    """A list that grows by the shape of A at every forward pass of the base: (rank, in), or (clients, rank, in)."""
    model: PreTrainedModel = resident.model
    layer = model.get_submodule(resident.layout.targets[0].path)
    seen: list[tuple[int, ...]] = []
    layer.register_forward_pre_hook(lambda module, _: seen.append(tuple(module.a.shape)))
    return seen
