"""Fill docs/study.md: every number of the page comes from the raw data by a name in double braces of study/page.md.

Not here: the words, which are in that file, and the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from study.definition import CORNERS, CROSS, GRID, GRID_POINTS, METHODS_POINT, SIZES, SLOWER, SLOWER_RATES, plan
from study.readings import (
    Run,
    Study,
    at_round,
    comparable,
    diverged,
    line_over,
    loss_change,
    mean_change,
    of_part,
    place,
    rules_of,
    slope,
)

__all__ = ["BEGIN", "TIE", "study_page"]

BEGIN = "<!-- Written by `python -m study.figures` from study/page.md and study/results; change those. -->\n\n"
TIE = 0.005
"""Nats of test loss; rules whose means differ by less are called a tie."""
NOTHING = "not run"


def study_page(template: str, study: Study) -> str:
    """The page; a name in braces that nothing computes raises KeyError."""
    whole = comparable(study)
    return BEGIN + re.sub(r"\{\{([a-z_]+)\}\}", lambda found: VALUES[found[1]](whole), template)


def _sweep(study: Study, task: str) -> str:
    runs = [run for run in of_part(study, "sweep") if run["task"] == task]
    header = ["learning rate", *(f"{run['settings']['local.learning_rate']:g}" for run in runs)]
    losses = ["validation loss", *(_number(run["last"]["validation"]["eval_loss"]) for run in runs if "last" in run)]
    return _table(header, [losses]) if runs else NOTHING


def _cross(study: Study) -> str:
    """Mean change of the test loss of every rule at every point."""
    kept = of_part(study, "kept")
    points = sorted(CROSS, key=lambda point: (point[1] != 10, point[1], point[0]))
    rows = [[rule, *(_mean(_at(kept, rule, point)) for point in points)] for rule in rules_of(kept)]
    return _table(["rule", *(f"({rank}, {clients})" for rank, clients in points)], rows)


def _against(study: Study) -> str:
    """At how many points of the cross sfed wins, ties and loses against each other rule."""
    kept = of_part(study, "kept")
    rows = []
    for rival in [rule for rule in rules_of(kept) if rule != "sfed"]:
        found: dict[str, list[str]] = {"wins": [], "ties": [], "loses": []}
        for point in CROSS:
            own, other = (mean_change(_at(kept, rule, point)) for rule in ("sfed", rival))
            if own is not None and other is not None:
                verdict = "ties" if abs(own - other) < TIE else "wins" if own < other else "loses"
                found[verdict].append(f"({point[0]}, {point[1]})")
        rows.append([rival, *(", ".join(found[verdict]) or "-" for verdict in ("wins", "ties", "loses"))])
    return _table(["sfed against", "wins", "ties", "loses"], rows)


def _slopes(study: Study) -> str:
    kept = of_part(study, "kept")
    readings = (("grad_norm_b", 1), ("grad_norm_b", 2), ("grad_norm_a", 2), ("gain", 2))
    rows = [
        [
            rule,
            *(
                _signed(slope(line_over(kept, rule, axis, at_round(key, number))), 2)
                for key, number in readings
                for axis in (0, 1)
            ),
        ]
        for rule in rules_of(kept)
    ]
    names = ("grad B, round 1", "grad B, round 2", "grad A, round 2", "gain, round 2")
    return _table(["rule", *(f"{name}: in {axis}" for name in names for axis in ("r", "N"))], rows)


def _rates(study: Study) -> str:
    """At each point of the grid: every rule's change at every rate, and its best."""
    grid = of_part(study, "grid")
    kept = [run for run in of_part(study, "kept") if run["settings"]["seed"] == 0]
    rows = []
    for point in GRID_POINTS:
        for rule in rules_of(grid):
            own = {run["rate"]: run for run in _at([*grid, *kept], rule, point)}
            changes = {rate: loss_change(run) for rate, run in own.items()}
            known = {rate: change for rate, change in changes.items() if change is not None}
            best = min(known, key=lambda rate: known[rate]) if known else None
            cells = [_one(own.get(factor)) for factor in GRID]
            last = "-" if best is None else f"{_signed(known[best], 3)} at {best:g}"
            rows.append([f"({point[0]}, {point[1]})", rule, *cells, last])
    return _table(["point", "rule", *(f"rate x {factor:g}" for factor in GRID), "best"], rows)


def _slower(study: Study) -> str:
    """`sfed` with a slower A beside its rivals at steps of one size."""
    fixed = [run for run in [*of_part(study, "grid"), *of_part(study, "kept")] if run["settings"]["seed"] == 0]
    halves = [factor / 2 for factor in SLOWER_RATES]
    rows = []
    for point in GRID_POINTS:
        for rule, runs, factors in (
            (SLOWER.label, of_part(study, "slower_a"), SLOWER_RATES),
            ("reinit", fixed, halves),
            ("rslora + shared", fixed, halves),
        ):
            own = {run["rate"]: run for run in _at(runs, rule, point)}
            cells = [f"{_one(own.get(factor))} (rate x {factor:g})" for factor in factors]
            rows.append([f"({point[0]}, {point[1]})", rule, *cells])
    return _table(["point", "rule", *(f"steps x {factor:g}" for factor in halves)], rows)


def _methods(study: Study) -> str:
    kept = _at(of_part(study, "kept"), None, METHODS_POINT)
    return _method_table([*kept, *of_part(study, "methods")])


def _method_table(runs: Sequence[Run]) -> str:
    rows = []
    for rule in rules_of(runs):
        own = [run for run in runs if run["rule"] == rule]
        change = mean_change(own)
        rows.append((change, [rule, f"{own[0]['gamma']:.3g}", str(len(own)), _mean(own), _mean(own, "accuracy")]))
    rows.sort(key=lambda row: float("inf") if row[0] is None else row[0])
    header = ["method or rule", "gamma", "seeds", "change of test loss", "change of accuracy"]
    return _table(header, [cells for _, cells in rows])


def _dialogue(study: Study) -> str:
    runs = of_part(study, "dialogue")
    columns = [(point, 1.0) for point in CORNERS] + [(CORNERS[0], 0.25)]
    rows = [
        [rule, *(_mean([run for run in _at(runs, rule, point) if run["rate"] == rate]) for point, rate in columns)]
        for rule in rules_of(runs)
    ]
    names = [f"({point[0]}, {point[1]}){'' if rate == 1 else f', rate x {rate:g}'}" for point, rate in columns]
    return _table(["rule", *names], rows)


def _new_clients(study: Study) -> str:
    """Mean test loss and accuracy over new clients and seeds."""
    rows = []
    for rule in ("sfed", "rslora + shared"):
        runs = [run for run in of_part(study, "kept", rule=rule) if run.get("new_clients")]
        found = [client for run in runs for client in run["new_clients"].values()]
        for row in found[0] if found else ():
            losses, accuracies = (fmean(client[row][key] for client in found) for key in ("eval_loss", "accuracy"))
            name = "zero-shot" if row == "untouched" else row
            rows.append([rule, name, f"{losses:.3f}", f"{accuracies:.3f}", str(len(found))])
    return _table(["federation", "new client", "test loss", "accuracy", "clients x seeds"], rows)


def _at(runs: Sequence[Run], rule: str | None, point: tuple[int, int]) -> list[Run]:
    return [run for run in runs if (rule is None or run["rule"] == rule) and place(run) == point]


def _mean(runs: Sequence[Run], key: str = "eval_loss") -> str:
    """Mean over seeds, with the lowest and highest where there are several."""
    mean = mean_change(runs, key)
    if not runs:
        return "-"
    if mean is None:
        return "diverged"
    if len(runs) == 1:
        return _signed(mean, 3)
    singles = sorted(change for run in runs if (change := mean_change([run], key)) is not None)
    return f"{_signed(mean, 3)} ({_signed(singles[0], 3)} to {_signed(singles[-1], 3)})"


def _one(run: Run | None) -> str:
    if run is None:
        return "-"
    return "diverged" if diverged(run) else _signed(loss_change(run), 3)


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _rate(study: Study, task: str) -> str:
    """The kept learning rate of a task."""
    parts = {"sentences": "kept", "dialogue": "dialogue"}
    runs = of_part(study, parts[task], rate=1.0)
    return f"{runs[0]['settings']['local.learning_rate']:g}" if runs else NOTHING


def _plain(value: Any) -> Callable[[Study], str]:
    return lambda _: f"{value:g}" if isinstance(value, float) else str(value)


def _start(study: Study) -> str:
    """Test loss and accuracy of the untouched model, over the runs of the cross."""
    runs = [run for run in of_part(study, "kept") if "initial" in run]
    losses, accuracies = ([run["initial"]["test"][key] for run in runs] for key in ("eval_loss", "accuracy"))
    return f"{fmean(losses):.3f} nats, accuracy {fmean(accuracies):.3f}" if runs else NOTHING


VALUES: Mapping[str, Callable[[Study], str]] = {
    "num_runs": lambda study: str(len(study)),
    "num_planned": _plain(len(plan())),
    "cpu_minutes": lambda study: f"{sum(run['cpu_seconds'] for run in study) / 60:.0f}",
    "tie": _plain(TIE),
    "sentence_rounds": _plain(SIZES["sentences"].num_rounds),
    "sentence_steps": _plain(SIZES["sentences"].local_steps),
    "sentence_batch": _plain(SIZES["sentences"].batch_size),
    "sentence_gamma": _plain(SIZES["sentences"].gamma),
    "sentence_rate": lambda study: _rate(study, "sentences"),
    "dialogue_rounds": _plain(SIZES["dialogue"].num_rounds),
    "dialogue_steps": _plain(SIZES["dialogue"].local_steps),
    "dialogue_batch": _plain(SIZES["dialogue"].batch_size),
    "dialogue_gamma": _plain(SIZES["dialogue"].gamma),
    "dialogue_rate": lambda study: _rate(study, "dialogue"),
    "start": _start,
    "sentence_sweep": lambda study: _sweep(study, "sentences"),
    "dialogue_sweep": lambda study: _sweep(study, "dialogue"),
    "cross": _cross,
    "against": _against,
    "slopes": _slopes,
    "rates": _rates,
    "slower_a": _slower,
    "methods": _methods,
    "paper": lambda study: _method_table(of_part(study, "paper")),
    "dialogue": _dialogue,
    "new_clients": _new_clients,
}
