"""Hand-computed learning rates."""

from __future__ import annotations

import math

import pytest

from sfedlora.federation.schedule import Schedule, learning_rate_at


def rates(schedule: Schedule, *, warmup: int, rounds: int) -> list[float]:
    return [
        learning_rate_at(number, peak=8.0, schedule=schedule, warmup_rounds=warmup, num_rounds=rounds)
        for number in range(1, rounds + 1)
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "rounds", "expected"),
    [
        ("constant", 0, 3, [8, 8, 8]),
        ("constant", 2, 4, [4, 8, 8, 8]),
        ("linear", 0, 4, [8, 6, 4, 2]),
        ("linear", 2, 6, [4, 8, 8, 6, 4, 2]),
        ("cosine", 0, 2, [8, 4]),
        ("cosine", 0, 4, [8, 4 + 4 / math.sqrt(2), 4, 4 - 4 / math.sqrt(2)]),
        ("cosine", 1, 3, [8, 8, 4]),
        ("linear", 3, 3, [8 / 3, 16 / 3, 8]),
        ("cosine", 0, 1, [8]),
        ("linear", 4, 4, [2, 4, 6, 8]),
    ],
)
def test_rates_by_hand(schedule: Schedule, warmup: int, rounds: int, expected: list[float]) -> None:
    assert rates(schedule, warmup=warmup, rounds=rounds) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_round_learns(schedule: Schedule) -> None:
    assert min(rates(schedule, warmup=2, rounds=50)) > 0
