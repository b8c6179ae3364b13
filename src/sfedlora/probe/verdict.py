"""What the measurements of a probe mean: slopes, whether the law holds, and what to set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sfedlora.lora.scaling import ScalingRule, scaling_factor
from sfedlora.probe.measure import Cell, LadderStep, Measurements
from sfedlora.report.panels import fit_slope

__all__ = ["Slopes", "Verdict", "judge", "largest_stable_rate", "slopes_of"]

FLAT = 0.15
"""A slope nearer to 0 than this counts as flat, and one nearer than this to the law's value as the law's."""
SAFETY, LOWEST = 2.0, 32.0
"""The safe range ends at the largest stable rate divided by the first, and begins at its end divided by the second."""
LAW: dict[tuple[ScalingRule, str], tuple[float, float]] = {
    ("sfed", "independent"): (0.0, 0.0),
    ("rslora", "independent"): (0.0, -0.5),
    ("lora", "independent"): (-0.5, -0.5),
}


@dataclass(frozen=True)
class Slopes:
    """Log-log slopes of one scaling and initialisation; None where too few sizes were measured.

    Attributes:
        rule, init: which.
        grad_b_rank, grad_b_clients: of |grad B| at the first step of round 2.
        gain_rank, gain_clients: of gain.
        grad_a_clients: of |grad A|.
    """

    rule: ScalingRule
    init: Literal["independent", "shared"]
    grad_b_rank: float | None
    grad_b_clients: float | None
    gain_rank: float | None
    gain_clients: float | None
    grad_a_clients: float | None


@dataclass(frozen=True)
class Verdict:
    """A probe's conclusion.

    Attributes:
        holds: whether sfed is flat in rank and clients with independent draws, and the other rules are not.
        slopes: of every rule measured.
        adam_slopes: rule -> slope in the rank of the loss that one AdamW step takes away; empty for SGD.
        scaling, init, alpha: what to set.
        gamma: what that makes at the configuration's rank and clients.
        learning_rates: lowest and highest rate of the safe range at the configuration's number of clients; None where
            no rate that was tried is stable.
        lines: the same in words, with reasons.
    """

    holds: bool
    slopes: tuple[Slopes, ...]
    adam_slopes: dict[ScalingRule, float]
    scaling: ScalingRule
    init: Literal["independent", "shared"]
    alpha: float
    gamma: float
    learning_rates: tuple[float, float] | None
    lines: tuple[str, ...]


def judge(measured: Measurements) -> Verdict:
    """The conclusion of a probe."""
    slopes = slopes_of(measured.cells)
    adam = _adam_slopes(measured)
    holds = all(_follows_law(each) for each in slopes if each.init == "independent")
    lora = measured.config.lora
    wants_shared = lora.init == "shared" or (lora.init == "auto" and lora.scaling != "sfed")
    scaling: ScalingRule = "rslora" if wants_shared else "sfed"
    init: Literal["independent", "shared"] = "shared" if wants_shared else "independent"
    rank = lora.rank if isinstance(lora.rank, int) else max(lora.rank)
    gamma = scaling_factor(scaling, alpha=lora.alpha, rank=rank, num_clients=measured.effective_clients)
    rates = _safe_rates(measured)
    lines = [
        *_law_lines(slopes, holds),
        *_shared_lines(slopes, measured),
        *_count_lines(measured),
        *_adam_lines(adam),
        *_rate_lines(slopes, measured),
        _advice(scaling, init, lora.alpha, gamma, rates, measured),
    ]
    return Verdict(holds, slopes, adam, scaling, init, lora.alpha, gamma, rates, tuple(lines))


def slopes_of(cells: Sequence[Cell]) -> tuple[Slopes, ...]:
    """The slopes of every scaling and initialisation among the cells.

    Slopes in the rank are taken at the largest number of clients, those in the clients at the rank with most of them.
    """
    found = []
    for rule, init in dict.fromkeys((cell.rule, cell.init) for cell in cells):
        own = [cell for cell in cells if (cell.rule, cell.init) == (rule, init)]
        largest = max(cell.size.num_clients for cell in own)
        by_rank = [cell for cell in own if cell.size.num_clients == largest]
        counts = [cell.size.rank for cell in own]
        middle = max(dict.fromkeys(counts), key=counts.count)
        by_clients = [cell for cell in own if cell.size.rank == middle]
        found.append(
            Slopes(
                rule,
                init,
                _slope(by_rank, lambda cell: cell.size.rank, lambda cell: cell.grad_norm_b),
                _slope(by_clients, lambda cell: cell.size.num_clients, lambda cell: cell.grad_norm_b),
                _slope(by_rank, lambda cell: cell.size.rank, lambda cell: cell.gain),
                _slope(by_clients, lambda cell: cell.size.num_clients, lambda cell: cell.gain),
                _slope(by_clients, lambda cell: cell.size.num_clients, lambda cell: cell.grad_norm_a),
            )
        )
    return tuple(found)


def largest_stable_rate(ladder: Sequence[LadderStep]) -> float | None:
    """The largest rate below every one that diverged; None if the lowest one did."""
    stable = None
    for step in sorted(ladder, key=lambda step: step.learning_rate):
        if step.diverged:
            break
        stable = step.learning_rate
    return stable


def _slope(cells: Sequence[Cell], x: Callable[[Cell], int], y: Callable[[Cell], float]) -> float | None:
    points = [(float(x(cell)), y(cell)) for cell in cells if y(cell) > 0 and math.isfinite(y(cell))]
    return fit_slope(points) if len({at for at, _ in points}) > 1 else None


def _follows_law(slopes: Slopes) -> bool:
    expected = LAW[slopes.rule, slopes.init]
    measured = (slopes.grad_b_rank, slopes.grad_b_clients)
    return all(value is not None and abs(value - law) <= FLAT for value, law in zip(measured, expected, strict=True))


def _adam_slopes(measured: Measurements) -> dict[ScalingRule, float]:
    found: dict[ScalingRule, float] = {}
    for rule in dict.fromkeys(rule for rule, _, _ in measured.adam_steps):
        points = [(float(rank), drop) for own, rank, drop in measured.adam_steps if own == rule and drop > 0]
        if len(points) > 1:
            found[rule] = fit_slope(points)
    return found


def _safe_rates(measured: Measurements) -> tuple[float, float] | None:
    """The range at the configuration's number of clients, by the power of N between the two ladders."""
    largest = _rates_by_clients(measured)
    if any(rate is None for rate in largest.values()) or not largest:
        return None
    points = [(float(count), rate) for count, rate in largest.items() if rate is not None]
    fall = min(0.0, fit_slope(points)) if len(points) > 1 else 0.0
    count, rate = points[-1]
    high = rate * max(1.0, measured.effective_clients / count) ** fall / SAFETY
    return high / LOWEST, high


def _rates_by_clients(measured: Measurements) -> dict[int, float | None]:
    counts = sorted({step.size.num_clients for step in measured.ladders})
    return {
        count: largest_stable_rate([step for step in measured.ladders if step.size.num_clients == count])
        for count in counts
    }


def _law_lines(slopes: Sequence[Slopes], holds: bool) -> list[str]:
    shown = ", ".join(
        f"{each.rule} {_signed(each.grad_b_rank)} in r and {_signed(each.grad_b_clients)} in N"
        for each in slopes
        if each.init == "independent"
    )
    lines = [f"Slopes of |grad B| with independent draws of A: {shown}."]
    if holds:
        lines.append(
            "The law holds for this model and data: with alpha sqrt(N/r) the gradient of B keeps its size at any rank "
            "and number of clients; with alpha/sqrt(r) it shrinks with clients, with alpha/r with both."
        )
    else:
        off = [each for each in slopes if each.init == "independent" and not _follows_law(each)]
        laws = {each.rule: LAW[each.rule, each.init] for each in off}
        names = ", ".join(f"{rule} (expected {_signed(r)} and {_signed(n)})" for rule, (r, n) in laws.items())
        lines.append(
            f"The law does not hold here within {FLAT:g}: {names}. Ranks above min(in_features, out_features), very "
            "few examples or a very large alpha do that; try --ranks and --clients nearer to your own, and trust a "
            "short `sfedlora compare` more than this probe."
        )
    return lines


def _shared_lines(slopes: Sequence[Slopes], measured: Measurements) -> list[str]:
    own = next((each.grad_b_clients for each in slopes if each.init == "shared"), None)
    if own is None:
        return []
    count = measured.effective_clients
    if own < FLAT:
        return [f"With one shared draw of A the slope of sfed in N is {_signed(own)}; +0.5 was expected."]
    over = (
        f"With one shared draw of A the slope of sfed in N is {_signed(own)}: averaging does not shrink A then, N "
        f"drops out of the law, and sfed with plain N over-amplifies, {math.sqrt(count):.2g} times for your "
        f"{count:.3g} effective clients. Use sfed with lora.init: independent only, rslora with shared."
    )
    return [over]


def _count_lines(measured: Measurements) -> list[str]:
    counted = f"Your federation: {measured.num_clients} clients, {measured.effective_clients:.4g} effective by weights"
    if measured.measured_clients is None:
        return [f"{counted} (not measured on the draws)."]
    off = abs(measured.measured_clients / measured.effective_clients - 1.0) > 0.2
    hint = "; they differ by more than 20 %, so the draws are not independent or the adapter is tiny" if off else ""
    return [f"{counted}, {measured.measured_clients:.4g} measured on the draws of A{hint}."]


def _adam_lines(slopes: dict[ScalingRule, float]) -> list[str]:
    if not slopes:
        return []
    shown = ", ".join(f"{rule} {_signed(value)}" for rule, value in slopes.items())
    steep = slopes.get("sfed", 0.0) > FLAT
    hint = (
        " It grows with the rank under sfed: AdamW's step has the size of the learning rate whatever the gradient, "
        "which is outside the law. When you raise r fourfold, halve the learning rate, or use lora, or sgd."
        if steep
        else ""
    )
    return [f"Loss taken away by one AdamW step, slope in r: {shown}.{hint}"]


def _rate_lines(slopes: Sequence[Slopes], measured: Measurements) -> list[str]:
    lines = []
    growth = next((each.grad_a_clients for each in slopes if (each.rule, each.init) == ("sfed", "independent")), None)
    if growth is not None and growth > FLAT:
        lines.append(
            f"|grad A| grows with the clients under sfed (slope {_signed(growth)}), which the law says nothing about: "
            "the largest stable learning rate may fall with N. Against it: local.learning_rate_a_ratio = 1/N_eff under "
            "SGD (0 freezes A), or a lower learning rate."
        )
    shown = []
    for count, rate in _rates_by_clients(measured).items():
        ladder = [step for step in measured.ladders if step.size.num_clients == count]
        bad = [step.learning_rate for step in ladder if step.diverged]
        until = f"stable up to {rate:.3g}" if rate is not None else "no rate tried is stable"
        shown.append(f"N = {count}: {until}" + (f", diverges at {min(bad):.3g}" if bad else ", none tried diverges"))
    if shown:
        rank = measured.ladders[0].size.rank
        optimizer = measured.config.local.optimizer
        lines.append(f"Learning rates of {optimizer} with sfed at r = {rank}, by two short rounds: {'; '.join(shown)}.")
    return lines


def _advice(  # noqa: PLR0917 - the parts of a recommendation
    scaling: ScalingRule,
    init: str,
    alpha: float,
    gamma: float,
    rates: tuple[float, float] | None,
    measured: Measurements,
) -> str:
    rival = (
        "Compare it with rslora and lora.init: shared, the rival to beat."
        if scaling == "sfed"
        else "One shared draw needs no factor sqrt(N)."
    )
    range_text = "no learning rate that was tried is stable: lower alpha"
    if rates is not None:
        own = measured.config.local.learning_rate
        where = "inside" if rates[0] <= own <= rates[1] else ("above" if own > rates[1] else "below")
        range_text = f"learning rate {rates[0]:.2g} to {rates[1]:.2g} (yours, {own:g}, is {where})"
    return (
        f"Recommended: lora.scaling={scaling} lora.init={init} lora.alpha={alpha:g} (gamma {gamma:.4g} at your rank "
        f"and clients), {range_text}. {rival}"
    )


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{round(value, 2) + 0.0:+.2f}"
