"""One client after the other on one resident base model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Train each client of a cohort; a client that fails gives its error instead of an outcome."""
        for work in cohort:
            try:
                yield train_client(
                    self.resident,
                    self.data,
                    work,
                    self.training,
                    task=self.task,
                    pad_token_id=self.pad_token_id,
                    seed=self.seed,
                )
            except ClientError as error:
                yield error
