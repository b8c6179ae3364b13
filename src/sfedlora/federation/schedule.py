"""The learning rate of a round."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Schedule", "learning_rate_at"]

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_at(round_num: int, *, peak: float, schedule: Schedule, warmup_rounds: int, num_rounds: int) -> float:
    """Learning rate of one round; constant inside the round.

    Warmup: peak * round_num / warmup_rounds. After it, with p = rounds done since warmup / rounds left at its end:
    constant: peak; linear: peak * (1 - p); cosine: peak * (1 + cos(pi p)) / 2. The first round after warmup has p = 0,
    so the last round still learns.

    Args:
        round_num: from 1.
        peak: the configured learning rate.
        schedule: the shape after warmup.
        warmup_rounds: rounds of linear rise.
        num_rounds: rounds of the run.
    """
    if round_num <= warmup_rounds:
        return peak * round_num / warmup_rounds
    progress = (round_num - warmup_rounds - 1) / max(1, num_rounds - warmup_rounds)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * (1.0 + math.cos(math.pi * progress)) / 2.0
    return peak
