"""How a cohort is executed. A runner is the only thing that differs between ways to run a federation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork

__all__ = ["Runner"]


class Runner(Protocol):
    """Executes the work of a cohort, in any order; every outcome depends on its own work only."""

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Yield one outcome or error per client, as they come."""
        ...
