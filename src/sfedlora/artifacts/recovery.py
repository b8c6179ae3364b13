"""Which checkpoint a run can go on from when some of them are damaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfedlora.artifacts.checkpoints import Checkpoint, Checkpoints
from sfedlora.errors import StorageError

__all__ = ["Recovered", "newest_intact", "with_kept_best"]


@dataclass(frozen=True)
class Recovered:
    """What is intact of a run's checkpoints.

    Attributes:
        checkpoint: the newest intact one; None where there is none at all, damaged or not.
        kept: the rounds whose checkpoints are intact, oldest first.
        damaged: round -> what is wrong with its checkpoint, oldest first.
    """

    checkpoint: Checkpoint | None
    kept: tuple[int, ...]
    damaged: Mapping[int, str]

    def warning(self) -> str:
        """What is damaged and what is used instead; empty where nothing is damaged."""
        if not self.damaged or self.checkpoint is None:
            return ""
        newest = self.checkpoint.state.server.round_num
        reasons = "; ".join(self.damaged.values())
        rounds = ", ".join(map(str, self.damaged))
        skipped = any(round_num > newest for round_num in self.damaged)
        then = f"; the state after round {newest} is used instead" if skipped else ""
        return f"the checkpoint of round {rounds} is damaged ({reasons}){then}"


def newest_intact(checkpoints: Checkpoints) -> Recovered:
    """Read all checkpoints, clients' files included, and tell the intact from the damaged.

    Raises:
        StorageError: all are damaged; the message is about the newest one.
        InputError: one is of a newer format.
    """
    newest: Checkpoint | None = None
    first_error: StorageError | None = None
    kept: list[int] = []
    damaged: dict[int, str] = {}
    verified: set[Path] = set()
    for round_num in reversed(checkpoints.rounds()):
        try:
            checkpoint = checkpoints.verify(round_num, verified)
        except StorageError as error:
            damaged[round_num] = str(error)
            first_error = first_error or error
        else:
            kept.append(round_num)
            newest = newest or checkpoint
    if newest is None and first_error is not None:
        raise StorageError(f"{first_error} (no kept round before it is intact)")
    return Recovered(newest, tuple(reversed(kept)), dict(sorted(damaged.items())))


def with_kept_best(checkpoint: Checkpoint, kept: Iterable[int], metrics: Iterable[Mapping[str, Any]]) -> Checkpoint:
    """The checkpoint with the best of the kept rounds as the best round, where the best one's own is lost."""
    available = {*kept, checkpoint.state.server.round_num}
    progress = checkpoint.progress
    if progress["best_round"] is None or progress["best_round"] in available:
        return checkpoint
    best_round, best_loss = None, None
    for record in metrics:
        loss = record.get("eval_loss")
        usable = isinstance(loss, int | float) and math.isfinite(loss) and record["round_num"] in available
        if usable and (best_loss is None or loss < best_loss):
            best_round, best_loss = record["round_num"], loss
    return replace(checkpoint, progress={**progress, "best_round": best_round, "best_loss": best_loss})
