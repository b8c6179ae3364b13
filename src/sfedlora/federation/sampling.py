"""How the cohort of a round is chosen, and the fixed sample of clients that is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from sfedlora.seeds import numpy_generator

__all__ = ["choose_evaluated", "most_rounds", "sample_cohort", "sample_evaluated"]


def sample_cohort(client_ids: Sequence[str], cohort_size: int | None, *, seed: int, round_num: int) -> tuple[str, ...]:
    """The clients that train in a round: uniform without replacement, in client-id order; None takes all."""
    ordered = sorted(client_ids)
    if cohort_size is None or cohort_size >= len(ordered):
        return tuple(ordered)
    generator = numpy_generator(seed, "cohort", round_num)
    chosen = generator.choice(len(ordered), size=cohort_size, replace=False)
    return tuple(ordered[index] for index in sorted(chosen.tolist()))


def most_rounds(client_ids: Sequence[str], cohort_size: int | None, *, seed: int, num_rounds: int) -> int:
    """In how many of the first rounds the client that was drawn most often was in the cohort."""
    if cohort_size is None or cohort_size >= len(client_ids):
        return num_rounds
    counts: Counter[str] = Counter()
    for round_num in range(1, num_rounds + 1):
        counts.update(sample_cohort(client_ids, cohort_size, seed=seed, round_num=round_num))
    return max(counts.values())


def sample_evaluated(client_ids: Sequence[str], num_evaluated: int, *, seed: int) -> tuple[str, ...]:
    """The clients that are evaluated in every round, in client-id order."""
    ordered = sorted(client_ids)
    if num_evaluated >= len(ordered):
        return tuple(ordered)
    chosen = numpy_generator(seed, "evaluated").choice(len(ordered), size=num_evaluated, replace=False)
    return tuple(ordered[index] for index in sorted(chosen.tolist()))


def choose_evaluated(
    client_ids: Sequence[str], evaluated: Literal["all", "cohort"] | int, cohort: Sequence[str], *, seed: int
) -> tuple[str, ...]:
    """The clients that are evaluated after a round, in client-id order.

    Args:
        client_ids: all clients.
        evaluated: all of them, those of the cohort (all where it has none of them), or a fixed sample of so many.
        cohort: who trained in the round.
        seed: of the run.
    """
    if evaluated == "cohort":
        chosen = tuple(client_id for client_id in cohort if client_id in client_ids)
        return chosen or tuple(sorted(client_ids))
    if evaluated == "all":
        return tuple(sorted(client_ids))
    return sample_evaluated(client_ids, evaluated, seed=seed)
