"""Slopes and verdicts from numbers made up by the law, and by its violations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sfedlora import RunConfig
from sfedlora.probe import Measurements, judge
from sfedlora.probe.measure import Cell, LadderStep, Size
from sfedlora.probe.verdict import largest_stable_rate, slopes_of

RANKS, CLIENTS, MIDDLE = (4, 32, 256), (2, 4, 8), 32
EXPONENTS = {
    ("sfed", "independent"): (0.0, 0.0),
    ("rslora", "independent"): (0.0, -0.5),
    ("lora", "independent"): (-0.5, -0.5),
    ("sfed", "shared"): (0.0, 0.5),
}


def config(**lora: Any) -> RunConfig:
    values = {"model": {"source": "m"}, "data": {"source": "d"}, "partition": {"num_clients": 32}}
    return RunConfig.from_mapping({**values, "lora": {"rank": 32, "alpha": 16.0, **lora}})


def law_cells(exponents: dict[tuple[str, str], tuple[float, float]] = EXPONENTS) -> tuple[Cell, ...]:
    """|grad B| = 3 r^p N^q, gain = 2 r^2p N^2q, |grad A| = N^0.9."""
    sizes = [Size(rank, 8) for rank in RANKS] + [Size(MIDDLE, count) for count in CLIENTS if count != 8]
    cells = []
    for (rule, init), (p, q) in exponents.items():
        for size in sizes:
            norm = 3.0 * size.rank**p * size.num_clients**q
            gain = 2.0 * size.rank ** (2 * p) * size.num_clients ** (2 * q)
            cells.append(Cell(rule, init, size, norm, size.num_clients**0.9, gain))  # type: ignore[arg-type]
    return tuple(cells)


def ladder(num_clients: int, good: list[float], bad: list[float]) -> list[LadderStep]:
    size = Size(32, num_clients)
    return [LadderStep(size, rate, 1.0, False) for rate in good] + [LadderStep(size, rate, None, True) for rate in bad]


def measured(**changes: Any) -> Measurements:
    whole = Measurements(
        config=config(),
        num_clients=32,
        effective_clients=32.0,
        measured_clients=31.9,
        cells=law_cells(),
        adam_steps=tuple(
            (rule, rank, 5.0 * rank**power)  # type: ignore[misc]
            for rule, power in (("sfed", 0.5), ("rslora", 0.5), ("lora", 0.0))
            for rank in RANKS
        ),
        ladders=(*ladder(2, [0.01, 0.04], [0.16]), *ladder(8, [0.01, 0.02], [0.04])),
        initial_loss=3.0,
        law_learning_rate=1e-3,
        seconds=1.0,
    )
    return replace(whole, **changes)


def test_slopes_are_those_the_numbers_were_made_with() -> None:
    for slopes in slopes_of(law_cells()):
        p, q = EXPONENTS[slopes.rule, slopes.init]
        found = (slopes.grad_b_rank, slopes.grad_b_clients, slopes.gain_rank, slopes.gain_clients)
        assert found == pytest.approx((p, q, 2 * p, 2 * q))
        assert slopes.grad_a_clients == pytest.approx(0.9)


def test_where_the_law_holds_sfed_with_independent_draws_is_recommended() -> None:
    verdict = judge(measured())
    text = " ".join(verdict.lines)
    assert verdict.holds
    assert (verdict.scaling, verdict.init, verdict.alpha, verdict.gamma) == ("sfed", "independent", 16.0, 16.0)
    assert "The law holds" in text
    assert "32 clients, 32 effective by weights, 31.9 measured" in text
    assert "over-amplifies, 5.7 times" in text
    assert verdict.adam_slopes == {
        "sfed": pytest.approx(0.5), "rslora": pytest.approx(0.5), "lora": pytest.approx(0.0, abs=1e-9),
    }  # fmt: skip
    assert "|grad A| grows with the clients under sfed (slope +0.90)" in text
    assert "rslora and lora.init: shared, the rival to beat" in text


def test_the_safe_range_follows_the_fall_of_the_stable_rate_with_clients() -> None:
    """0.04 at 2 and 0.02 at 8 clients is a power of -1/2: 0.01 at 32, half of it for safety."""
    low, high = judge(measured()).learning_rates or (0, 0)
    assert high == pytest.approx(0.005)
    assert low == pytest.approx(0.005 / 32)
    assert "(yours, 0.001, is inside)" in judge(measured()).lines[-1]
    hot = measured(config=config().with_values({"local.learning_rate": 0.5}))
    assert "(yours, 0.5, is above)" in judge(hot).lines[-1]
    rising = measured(ladders=(*ladder(2, [0.01], [0.04]), *ladder(8, [0.02], [0.08])))
    assert (judge(rising).learning_rates or (0, 0))[1] == pytest.approx(0.01), "a rise is no reason for more"


def test_where_the_law_fails_it_is_said_and_which_slopes() -> None:
    broken = {**EXPONENTS, ("sfed", "independent"): (0.4, 0.0)}
    verdict = judge(measured(cells=law_cells(broken)))
    assert not verdict.holds
    assert any("does not hold" in line and "sfed (expected +0.00 and +0.00)" in line for line in verdict.lines)


def test_with_one_shared_draw_rslora_is_recommended() -> None:
    verdict = judge(measured(config=config(scaling="rslora", init="shared")))
    assert (verdict.scaling, verdict.init) == ("rslora", "shared")
    assert verdict.gamma == pytest.approx(16 / 32**0.5)


def test_no_stable_rate_gives_no_range() -> None:
    verdict = judge(measured(ladders=tuple(ladder(8, [], [0.1, 0.2]))))
    assert verdict.learning_rates is None
    assert "no learning rate that was tried is stable" in verdict.lines[-1]


def test_a_stable_rate_lies_below_all_that_diverge() -> None:
    assert largest_stable_rate(ladder(8, [0.1, 0.2], [0.4])) == 0.2
    assert largest_stable_rate(ladder(8, [0.1, 0.8], [0.4])) == 0.1
    assert largest_stable_rate(ladder(8, [], [0.4])) is None


def test_draws_that_do_not_count_as_they_should_are_named() -> None:
    assert any("differ by more than 20 %" in line for line in judge(measured(measured_clients=8.0)).lines)
