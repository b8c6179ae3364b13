"""What the training of a client is expected to take: by its tokens at first, then by the seconds that it took.

Costs decide who is trained first, never what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sfedlora.federation.client import LocalTraining

__all__ = ["Costs"]


class Costs:
    """What has been measured of a run's clients, in its own process."""

    def __init__(self, lengths: NDArray[np.int64], training: LocalTraining) -> None:
        """Take the tokens of every example and how much of them a round trains on."""
        self._lengths, self._training = lengths, training
        self._seconds: dict[str, float] = {}
        self._all_seconds, self._all_tokens = 0.0, 0.0

    def of(self, clients: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Expected cost of each client, in seconds or, before anything is measured, in tokens."""
        rate = self._all_seconds / self._all_tokens if self._all_tokens else 1.0
        return {
            client_id: self._seconds.get(client_id, rate * self._tokens(rows)) for client_id, rows in clients.items()
        }

    def note(self, clients: Mapping[str, Sequence[int]], seconds: float) -> None:
        """Take up the seconds of clients that were trained together, by their shares of the tokens."""
        tokens = {client_id: self._tokens(rows) for client_id, rows in clients.items()}
        total = sum(tokens.values())
        self._all_seconds += seconds
        self._all_tokens += total
        self._seconds |= {client_id: seconds * own / total for client_id, own in tokens.items()}

    def _tokens(self, rows: Sequence[int]) -> float:
        """Tokens of a round's training, padding aside."""
        lengths, training = self._lengths[np.asarray(rows, dtype=np.int64)], self._training
        if training.local_epochs is not None:
            return float(lengths.sum()) * training.local_epochs
        return float(lengths.mean()) * training.batch_size * training.accumulation * (training.local_steps or 1)
