"""A runner that keeps what passes: the work of every client and what it sent back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork
from sfedlora.federation.runners import Runner
from sfedlora.federation.state import Federation
from sfedlora.types import Tensors
from support.tiny_federation import Ran, run_all

__all__ = ["Capturing", "captured", "equal"]


@dataclass
class Capturing:
    """Hands everything on to another runner, one client at a time; no client may fail."""

    inner: Runner
    work: list[ClientWork] = field(default_factory=list)
    outcomes: list[ClientOutcome] = field(default_factory=list)

    @property
    def clients_per_batch(self) -> int:
        return self.inner.clients_per_batch

    def stack_at_most(self, clients_per_batch: int) -> None:
        self.inner.stack_at_most(clients_per_batch)

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        return self.inner.order(cohort, done)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        for work in cohort:
            self.work.append(work)
            for outcome in self.inner.run_cohort([work]):
                assert isinstance(outcome, ClientOutcome)
                self.outcomes.append(outcome)
                yield outcome


def captured(federation: Federation) -> tuple[Ran, Capturing]:
    """Run every round, and what passed."""
    runner = Capturing(federation.runner)
    return run_all(replace(federation, runner=runner)), runner


def equal(left: Tensors, right: Tensors) -> bool:
    """Whether two mappings hold the same tensors."""
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)
