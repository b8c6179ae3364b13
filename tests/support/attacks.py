"""Hostile clients: a runner whose chosen clients send something else than what training gave."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from sfedlora import RunConfig
from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainingSetup
from sfedlora.federation.round import evaluate_clients
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.state import Federation
from sfedlora.setup import prepare
from sfedlora.types import Part, select_parts
from support.tiny_federation import run_all

__all__ = ["Attack", "Hostile", "attacked", "honest_accuracy"]


@dataclass(frozen=True)
class Attack:
    """What the hostile clients do.

    Attributes:
        clients: who they are.
        strength: they send start + strength * (trained - start); negative ones send the opposite.
        flips_labels: they train on the other label.
    """

    clients: tuple[str, ...]
    strength: float
    flips_labels: bool = False


@dataclass
class Hostile:
    """Hands work on to another runner and spoils the shared factors of some clients' outcomes."""

    inner: Runner
    attack: Attack
    shared: frozenset[Part]

    @property
    def clients_per_batch(self) -> int:
        return self.inner.clients_per_batch

    def stack_at_most(self, clients_per_batch: int) -> None:
        self.inner.stack_at_most(clients_per_batch)

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        return self.inner.order(cohort, done)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        works = list(cohort)
        starts = {work.client_id: work.start for work in works}
        for outcome in self.inner.run_cohort(works):
            if isinstance(outcome, ClientOutcome) and outcome.client_id in self.attack.clients:
                start = starts[outcome.client_id]
                sent = {
                    name: start[name] + self.attack.strength * (tensor - start[name])
                    for name, tensor in select_parts(outcome.tensors, self.shared).items()
                }
                yield replace(outcome, tensors={**outcome.tensors, **sent})
            else:
                yield outcome


def attacked(federation: Federation, attack: Attack | None) -> Federation:
    """The federation with some of its clients turned hostile; it serves and evaluates as before."""
    if attack is None:
        return federation
    runner = federation.runner
    assert isinstance(runner, SerialRunner | BatchedRunner)
    if attack.flips_labels:
        runner = _trained_on(runner, _flipped(runner.setup, federation, attack.clients))
    shared = federation.method.shared_parts(1) | federation.method.shared_parts(2)
    return replace(federation, runner=Hostile(runner, attack, shared))


def honest_accuracy(config: RunConfig, attack: Attack | None, hostile: Collection[str]) -> float:
    """Mean test accuracy, after the last round, of the clients that are not hostile."""
    federation = attacked(prepare(config).federation, attack)
    state = run_all(federation).states[-1]
    honest = {client_id: split for client_id, split in federation.splits.items() if client_id not in hostile}
    everybody = replace(federation, splits=honest, rounds=replace(federation.rounds, evaluated="all"))
    results = evaluate_clients(everybody, state, "test", sorted(honest))
    return fmean(result.metrics()["accuracy"] for _, _, result in results)


def _trained_on(runner: SerialRunner | BatchedRunner, setup: TrainingSetup) -> SerialRunner | BatchedRunner:
    return SerialRunner(setup) if isinstance(runner, SerialRunner) else BatchedRunner(setup, runner.clients_per_batch)


def _flipped(setup: TrainingSetup, federation: Federation, clients: Collection[str]) -> TrainingSetup:
    """Two classes, exchanged on the training examples of some clients."""
    assert setup.data.labels is not None
    rows = np.concatenate([np.asarray(federation.participants[client_id]) for client_id in clients])
    labels = setup.data.labels.copy()
    labels[rows] = 1 - labels[rows]
    return replace(setup, data=replace(setup.data, labels=labels))
