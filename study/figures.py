"""Draw the study's figures and write its page from the raw data: `python -m study.figures` (or `make study-figures`).

study/results/*.jsonl -> docs/study/*.png, and docs/study.md from study/page.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from study.page import study_page
from study.readings import (
    Run,
    Study,
    at_round,
    center,
    comparable,
    diverged,
    line_over,
    loss_change,
    of_part,
    on_arm,
    place,
    read_study,
    rules_of,
)

from sfedlora.report.panels import GAIN, PALETTE, Panel
from sfedlora.report.plotting import draw_panels
from sfedlora.storage import write_text

__all__ = ["FIGURES", "draw_study", "main"]

HERE = Path(__file__).parent
RESULTS, PAGE, DOCS = HERE / "results", HERE / "page.md", HERE.parent / "docs"
SHADES = ("#c4b000", "#2fa36b", "#2b6a9e", "#431a5c")
"""Of small to large ranks or numbers of clients."""
CEILING = 0.1
"""Changes of the loss above it are drawn at it, as crosses."""
CHANGE = "change of the test loss (nats)"
COLOUR = dict(zip(("sfed", "rslora", "lora", "rslora + shared", "reinit"), PALETTE, strict=False))


def draw_study(study: Study, folder: Path) -> list[Path]:
    """All figures for which there are runs."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = comparable(study)
    return [path for name, draw in FIGURES.items() if (path := draw(whole, folder / f"{name}.png")) is not None]


def _final(study: Study, path: Path) -> Path | None:
    """Change of the test loss against r and N."""
    kept = of_part(study, "kept")
    if not kept:
        return None
    figure = _new_figure(10.5, 4.4)
    for axis, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        for rule in rules_of(kept):
            line = line_over(kept, rule, axis, loss_change)
            xs, means, lows, highs = ([point[at] for point in line.points] for at in range(4))
            colour = COLOUR[rule]
            axes.plot(xs, _capped(means), "-o", color=colour, markersize=4, linewidth=1.6, label=rule)
            axes.fill_between(xs, _capped(lows), _capped(highs), color=colour, alpha=0.12, linewidth=0)
            wild = [x for x, mean in zip(xs, means, strict=True) if mean > CEILING]
            axes.plot(wild, [CEILING] * len(wild), "x", color=colour, markersize=9, markeredgewidth=2)
        _name_ticks(axes, sorted({place(run)[axis] for run in on_arm(kept, axis)}))
        axes.set(xlabel=("rank r", "clients N")[axis], title=_where(kept, axis))
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel(CHANGE)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _gradients(study: Study, path: Path) -> Path | None:
    """Gradient norms of B in rounds 1 and 2, and of A in round 2, against r and N."""
    kept = of_part(study, "kept")
    readings = (("grad_norm_b", "B", 1), ("grad_norm_b", "B", 2), ("grad_norm_a", "A", 2))
    rows = [
        [
            Panel(
                f"|grad {factor}| in round {number}, {_where(kept, axis)}",
                ("rank r", "clients N")[axis],
                f"|grad {factor}|",
                [
                    line
                    for rule in rules_of(kept)
                    if (line := line_over(kept, rule, axis, at_round(key, number))).points
                ],
                log_x=True,
                log_y=True,
            )
            for axis in (0, 1)
        ]
        for key, factor, number in readings
    ]
    return draw_panels(rows, "Gradient norms at the first step of a round", path) if kept else None


def _by_round(key: str, label: str) -> Callable[[Study, Path], Path | None]:
    """Small multiples of one key per round: a column per rule, the ranks above, the numbers of clients below."""

    def draw(study: Study, path: Path) -> Path | None:
        kept = of_part(study, "kept")
        if not kept:
            return None
        rules = rules_of(kept)
        figure = _new_figure(2.5 * len(rules) + 0.5, 5.6)
        grid = figure.subplots(2, len(rules), sharex=True, sharey="row", squeeze=False)
        for axis in (0, 1):
            own = on_arm(kept, axis)
            sizes = sorted({place(run)[axis] for run in own})
            for rule, axes in zip(rules, grid[axis], strict=True):
                for shade, size in enumerate(sizes):
                    points = _mean_rounds([run for run in own if run["rule"] == rule and place(run)[axis] == size], key)
                    xs, ys = [point[0] for point in points], [point[1] for point in points]
                    axes.plot(xs, ys, "-", marker=".", color=SHADES[shade % len(SHADES)])
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.grid(visible=True, alpha=0.3)
                axes.set_title(rule if axis == 0 else "", fontsize=11)
            names = [f"{'rN'[axis]} = {size}" for size in sizes]
            handles = [Line2D([], [], color=SHADES[at % len(SHADES)], marker=".") for at in range(len(sizes))]
            grid[axis][-1].legend(handles, names, frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
            grid[axis][0].set_ylabel(f"{label}\n{_where(kept, axis)}", fontsize=9)
        figure.supxlabel("round", fontsize=10)
        return _save(figure, path)

    return draw


def _methods(study: Study, path: Path) -> Path | None:
    """One row per method at one point, mean as a bar, seeds as dots."""
    runs = of_part(study, "methods")
    if not runs:
        return None
    point = place(runs[0])
    by_name: dict[str, list[Run]] = {}
    for run in [*(run for run in of_part(study, "kept") if place(run) == point), *runs]:
        by_name.setdefault(run["rule"], []).append(run)
    changes = {name: [_cap(loss_change(run)) for run in own] for name, own in by_name.items()}
    names = sorted(changes, key=lambda name: -sum(changes[name]) / len(changes[name]))
    figure = _new_figure(8.5, 0.3 * len(names) + 1.2)
    axes = figure.subplots()
    for at, name in enumerate(names):
        mean = sum(changes[name]) / len(changes[name])
        axes.barh(at, mean, color=COLOUR.get(name, "#bbbbbb"), height=0.7)
        axes.plot(changes[name], [at] * len(changes[name]), "o", color="#333333", markersize=3)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.set(xlabel=CHANGE, title=f"Methods at r = {point[0]}, N = {point[1]}; bars are means, dots seeds")
    return _save(figure, path)


def _rates(study: Study, path: Path) -> Path | None:
    """Change of the test loss against the learning rate at the points of the grid."""
    grid = of_part(study, "grid")
    if not grid:
        return None
    points = list(dict.fromkeys(place(run) for run in grid))
    figure = _new_figure(10.5, 4.4)
    for axes, point in zip(figure.subplots(1, len(points), sharey=True, squeeze=False)[0], points, strict=True):
        runs = [run for run in [*grid, *of_part(study, "kept")] if place(run) == point and run["settings"]["seed"] == 0]
        for rule in rules_of(runs):
            own = sorted((run["settings"]["local.learning_rate"], run) for run in runs if run["rule"] == rule)
            _draw_rates(axes, own, COLOUR[rule], rule)
        _name_ticks(axes, sorted({run["settings"]["local.learning_rate"] for run in runs}))
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.grid(visible=True, alpha=0.3)
        axes.set(xlabel="learning rate", title=f"r = {point[0]}, N = {point[1]}")
    figure.axes[0].set_ylabel(CHANGE)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _draw_rates(axes: Axes, runs: Sequence[tuple[float, Run]], colour: str, label: str) -> None:
    """One rule's line; what got out of hand is a cross at the ceiling."""
    xs, ys = [rate for rate, _ in runs], [_cap(loss_change(run)) for _, run in runs]
    axes.plot(xs, ys, "-", color=colour, linewidth=1.4, label=label)
    for x, y, (_, run) in zip(xs, ys, runs, strict=True):
        axes.plot(x, y, "x" if diverged(run) else "o", color=colour, markersize=7 if diverged(run) else 4)


def _dialogue(study: Study, path: Path) -> Path | None:
    """Groups of bars: a corner each, a bar per rule."""
    runs = of_part(study, "dialogue")
    if not runs:
        return None
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rank, clients = place(run)
        groups.setdefault(f"r = {rank}, N = {clients}\nrate {run['settings']['local.learning_rate']:g}", []).append(run)
    figure = _new_figure(9.5, 4.2)
    axes = figure.subplots()
    rules = rules_of(runs)
    for at, own in enumerate(groups.values()):
        for run in own:
            x, value = at + (rules.index(run["rule"]) - len(rules) / 2 + 0.5) * 0.16, _cap(loss_change(run))
            axes.bar(x, value, width=0.15, color=COLOUR[run["rule"]])
            if diverged(run):
                axes.plot(x, value, "x", color="#333333", markersize=7)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_xlim(-0.6, max(len(groups), 2) - 0.4)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_ylabel(CHANGE)
    handles = [Line2D([], [], color=COLOUR[rule], linewidth=6) for rule in rules]
    axes.legend(handles, rules, frameon=False, fontsize=9)
    return _save(figure, path)


FIGURES: Mapping[str, Callable[[Study, Path], Path | None]] = {
    "final": _final,
    "gradients": _gradients,
    "gradient-rounds": _by_round("grad_norm_b", "|grad B| at the first step"),
    "gain-rounds": _by_round("gain", GAIN.split(":", 1)[0]),
    "methods": _methods,
    "learning-rates": _rates,
    "dialogue": _dialogue,
}


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _mean_rounds(runs: Sequence[Run], key: str) -> list[tuple[int, float]]:
    """(round, mean over seeds) of what is above zero."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for record in run["rounds"]:
            if record.get(key) is not None and record[key] > 0:
                found.setdefault(record["round_num"], []).append(record[key])
    return [(number, sum(values) / len(values)) for number, values in sorted(found.items())]


def _name_ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _where(runs: Sequence[Run], axis: int) -> str:
    """What is held where the other one varies."""
    rank, clients = center(runs)
    return (f"N = {clients}", f"r = {rank}")[axis]


def _cap(change: float | None) -> float:
    return CEILING if change is None else min(change, CEILING)


def _capped(changes: Sequence[float]) -> list[float]:
    return [_cap(change) for change in changes]


def main() -> None:
    """Draw everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    arguments = parser.parse_args()
    study = read_study(arguments.results)
    for path in draw_study(study, arguments.docs / "study"):
        print(path)
    write_text(arguments.docs / "study.md", study_page(PAGE.read_text(encoding="utf-8"), study))


if __name__ == "__main__":
    main()
