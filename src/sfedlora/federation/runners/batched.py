"""Several clients in one forward pass: their adapters stacked over one frozen base.

Worth it where a client's own batch is too small to keep the processor busy. The same seeds, batches and masks as one
after the other; sums inside a forward pass are taken in another order, so results agree to rounding, not to the bit.
Which clients share a stack therefore depends on the cohort alone (`stacks`), never on who has finished already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainingSetup, train_clients
from sfedlora.federation.memory import is_out_of_memory, warn_of_halving
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

    def stack_at_most(self, clients_per_batch: int) -> None:
        """Lower C to a number that was recorded."""
        self.clients_per_batch = min(self.clients_per_batch, clients_per_batch)

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        """Clients with like numbers and lengths of batches together, so that they share forward passes."""
        lengths, training = self.setup.data.lengths, self.setup.training

        def key(client_id: str) -> tuple[int, int, float, str]:
            rows = np.asarray(cohort[client_id])
            num_batches = 0 if training.local_epochs is None else -(-len(rows) // training.batch_size)
            return -num_batches, -min(len(rows), training.batch_size), float(lengths[rows].mean()), client_id

        stacks = self.stacks(sorted(cohort, key=key))
        return [client_id for stack in stacks if not set(stack) <= set(done) for client_id in stack]

    def stacks(self, clients: Iterable[Client]) -> Iterator[list[Client]]:
        """Cut clients into stacks of C neighbours, each made when it is asked for."""
        together: list[Client] = []
        for client in clients:
            together.append(client)
            if len(together) >= self.clients_per_batch:
                yield together
                together = []
        if together:
            yield together

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[Result]:
        """Train the clients of a cohort; one that fails gives its error instead of an outcome."""
        for together in self.stacks(cohort):
            yield from self._run(together)

    def _run(self, works: Sequence[ClientWork]) -> Iterator[Result]:
        """Train a stack; in several if C has become smaller than it is."""
        while len(works) > self.clients_per_batch:
            yield from self._run(works[: self.clients_per_batch])
            works = works[self.clients_per_batch :]
        reason = ""
        try:
            results = [outcome_or_error(self.setup, works[0])] if len(works) == 1 else train_clients(self.setup, works)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if is_out_of_memory(error):
                reason = type(error).__name__
        else:
            yield from results
            return
        # One of them spoils the whole (or all are too many): halves find out, down to one client at a time. Outside
        # `except`, because the error holds the batch in memory as long as it lives.
        half = (len(works) + 1) // 2
        if reason:
            self.clients_per_batch = half
            warn_of_halving(len(works), half, reason)
        yield from self._run(works[:half])
        yield from self._run(works[half:])
