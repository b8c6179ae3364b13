"""How the cohort of a round is chosen, and the fixed sample of clients that is evaluated."""

from __future__ import annotations

from collections.abc import Sequence

from sfedlora.seeds import numpy_generator

__all__ = ["sample_cohort", "sample_evaluated"]


def sample_cohort(client_ids: Sequence[str], cohort_size: int | None, *, seed: int, round_num: int) -> tuple[str, ...]:
    """The clients that train in a round: uniform without replacement, in client-id order; None takes all."""
    ordered = sorted(client_ids)
    if cohort_size is None or cohort_size >= len(ordered):
        return tuple(ordered)
    generator = numpy_generator(seed, "cohort", round_num)
    chosen = generator.choice(len(ordered), size=cohort_size, replace=False)
    return tuple(ordered[index] for index in sorted(chosen.tolist()))


def sample_evaluated(client_ids: Sequence[str], num_evaluated: int, *, seed: int) -> tuple[str, ...]:
    """The clients that are evaluated in every round, in client-id order."""
    ordered = sorted(client_ids)
    if num_evaluated >= len(ordered):
        return tuple(ordered)
    chosen = numpy_generator(seed, "evaluated").choice(len(ordered), size=num_evaluated, replace=False)
    return tuple(ordered[index] for index in sorted(chosen.tolist()))
