"""How a cohort is executed. A runner is the only thing that differs between ways to run a federation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork

__all__ = ["Runner"]


class Runner(Protocol):
    """Executes the work of a cohort; every outcome depends on its own work only."""

    def order(self, cohort: Mapping[str, Sequence[int]]) -> list[str]:
        """The order in which the runner wants the work of these clients.

        Args:
            cohort: client id -> positions of its training examples.
        """
        ...

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Yield one outcome or error per client, in any order. Work is made when it is asked for."""
        ...
