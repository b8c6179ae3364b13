"""One client after the other on one resident base model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sfedlora.data.encoded import EncodedData
from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork, LocalTraining, train_client
from sfedlora.federation.objective import Task
from sfedlora.lora.inject import ResidentModel

__all__ = ["SerialRunner"]


@dataclass(frozen=True)
class SerialRunner:
    """Runs a cohort client by client; swapping clients costs one copy of their adapter."""

    resident: ResidentModel
    data: EncodedData
    training: LocalTraining
    task: Task
    pad_token_id: int
    seed: int

    def order(self, cohort: Mapping[str, Sequence[int]]) -> list[str]:
        """By client id."""
        return sorted(cohort)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Train each client of a cohort; a client that fails gives its error instead of an outcome.

        What torch refuses (no memory for this client's batches, kept moments that do not fit) is a failure of the
        client too: the next one starts from its own adapter and may well succeed.
        """
        for work in cohort:
            # Not yielded inside `except`: the error holds the batch and its graph in memory as long as it lives.
            yield self._outcome_or_error(work)

    def _outcome_or_error(self, work: ClientWork) -> ClientOutcome | ClientError:
        try:
            return train_client(
                self.resident,
                self.data,
                work,
                self.training,
                task=self.task,
                pad_token_id=self.pad_token_id,
                seed=self.seed,
            )
        except ClientError as error:
            return error.with_traceback(None)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return ClientError(reason, client_id=work.client_id, round_num=work.round_num, stage="training")
