"""One client after the other on one resident base model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainingSetup, train_client

__all__ = ["SerialRunner", "outcome_or_error"]


@dataclass(frozen=True)
class SerialRunner:
    """Runs a cohort client by client; swapping clients costs one copy of their adapter."""

    setup: TrainingSetup

    @property
    def clients_per_batch(self) -> int:
        """One."""
        return 1

    def stack_at_most(self, clients_per_batch: int) -> None:
        """Nothing: one is the least."""

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        """By client id, those that have not finished."""
        return sorted(cohort.keys() - set(done))

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Train each client of a cohort; a client that fails gives its error instead of an outcome."""
        for work in cohort:
            # Not yielded inside `except`: the error holds the batch and its graph in memory as long as it lives.
            yield outcome_or_error(self.setup, work)


def outcome_or_error(setup: TrainingSetup, work: ClientWork) -> ClientOutcome | ClientError:
    """Train one client; whatever goes wrong is its error.

    What torch refuses (no memory for this client's batches, kept moments that do not fit) is a failure of the client
    too: the next one starts from its own adapter and may well succeed.
    """
    try:
        return train_client(setup, work)
    except ClientError as error:
        return error.with_traceback(None)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return ClientError(reason, client_id=work.client_id, round_num=work.round_num, stage="training")
