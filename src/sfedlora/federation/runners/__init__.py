"""How a cohort is executed. A runner is the only thing that differs between ways to run a federation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork

__all__ = ["Runner"]


class Runner(Protocol):
    """Executes the work of a cohort; every outcome depends on its own work only, up to rounding.

    Where several clients are stacked in one forward pass, the bits depend on who they are. So a stack is formed from
    the whole cohort and runs as a whole.
    """

    @property
    def clients_per_batch(self) -> int:
        """Clients in a stack at present."""
        ...

    def stack_at_most(self, clients_per_batch: int) -> None:
        """Take up what an earlier process found that memory holds."""
        ...

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        """The clients whose work the runner wants, in its order: all but finished stacks.

        Args:
            cohort: client id -> positions of its training examples; the whole cohort.
            done: clients of it that finished before the round was interrupted. One that shares a stack with a client
                that did not is trained once more, to the same result.
        """
        ...

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Yield one outcome or error per client, in any order. Work is made when it is asked for."""
        ...
