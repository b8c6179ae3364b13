"""Several clients in one forward pass: their adapters stacked over one frozen base.

Worth it where a client's own batch is too small to keep the processor busy. The same seeds, batches and masks as one
after the other; sums inside a forward pass are taken in another order, so results agree to rounding, not to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainingSetup, train_clients
from sfedlora.federation.runners.serial import outcome_or_error

__all__ = ["BatchedRunner"]

Result = ClientOutcome | ClientError
Client = TypeVar("Client")


class BatchedRunner:
    """Runs a cohort `clients_per_batch` clients at a time.

    Attributes:
        setup: what local training needs.
        clients_per_batch: C; halved, with a warning, whenever the memory does not hold that many.
    """

    def __init__(self, setup: TrainingSetup, clients_per_batch: int) -> None:
        """Take what training needs and the first C, at least 2."""
        self.setup = setup
        self.clients_per_batch = clients_per_batch

    def order(self, cohort: Mapping[str, Sequence[int]]) -> list[str]:
        """Clients with like numbers of steps and like lengths of examples together, so that they share batches."""
        lengths, training = self.setup.data.lengths, self.setup.training

        def key(client_id: str) -> tuple[int, float, str]:
            rows = np.asarray(cohort[client_id])
            num_batches = 0 if training.local_epochs is None else -(-len(rows) // training.batch_size)
            return -num_batches, float(lengths[rows].mean()), client_id

        return sorted(cohort, key=key)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[Result]:
        """Train the clients of a cohort; one that fails gives its error instead of an outcome."""
        for together in self.stacks(cohort, lambda work: work.size.rank):
            yield from self._run(together)

    def stacks(self, clients: Iterable[Client], rank_of: Callable[[Client], int]) -> Iterator[list[Client]]:
        """Cut clients into stacks of neighbours, each made when it is asked for.

        Kept moments are laid out by rank, so clients that have any are stacked with their like only.
        """
        keeps = self.setup.training.keep_optimizer_state
        together: list[Client] = []
        for client in clients:
            same_layout = not together or not keeps or rank_of(together[0]) == rank_of(client)
            if together and not (same_layout and len(together) < self.clients_per_batch):
                yield together
                together = []
            together.append(client)
        if together:
            yield together

    def _run(self, works: Sequence[ClientWork]) -> list[Result]:
        if len(works) == 1:
            return [outcome_or_error(self.setup, works[0])]
        reason = ""
        try:
            return train_clients(self.setup, works)
        except (RuntimeError, MemoryError, ClientError) as error:
            if _is_out_of_memory(error):
                reason = f"{type(error).__name__}"
        # One of them spoils the whole (or all are too many): halves find out, down to one client at a time. Outside
        # `except`, because the error holds the batch in memory as long as it lives.
        half = (len(works) + 1) // 2
        if reason and half < self.clients_per_batch:
            self.clients_per_batch = half
            warnings.warn(
                f"{len(works)} clients in one batch do not fit into memory ({reason}); going on with {half}",
                stacklevel=2,
            )
        return [*self._run(works[:half]), *self._run(works[half:])]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error).lower()
