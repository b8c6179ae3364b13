"""What is drawn of a run and of a comparison: panels of lines, for PNG files and for the HTML report alike.

A method has a colour, from a palette that colour-blind readers can tell apart (Okabe and Ito); a size has a form (a
dash and a marker), and so has a method beyond the number of colours. Not here: how a panel is put on paper (`plotting`)
or on a page (`page`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sfedlora.report.load import CellRecord, RunRecord, lookup, number, run_points
from sfedlora.report.series import (
    CLIENTS,
    RANK,
    Line,
    by_size,
    line_of_points,
    lines_against,
    lines_by_method,
    lines_by_round,
    varying_keys,
)

__all__ = [
    "GAIN",
    "GRADIENT",
    "METRICS",
    "PALETTE",
    "Panel",
    "fit_slope",
    "gain_panel",
    "gradient_panel",
    "line_label",
    "line_styles",
    "loss_panels",
    "main_metric",
    "method_rows",
    "round_rows",
    "size_rows",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
GRADIENT_ROUND = 2  # the first round in which every client starts from an averaged A and a trained B
METRICS = {
    "eval_loss": "loss on validation (nats)",
    "perplexity": "perplexity on validation",
    "accuracy": "accuracy on validation",
    "macro_f1": "macro-F1 on validation",
}
GRADIENT = "gradient norm of B at the first step"
GAIN = "gain: gamma^2 ||A||^2 / in_features"


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its lines and how they are shown."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


def loss_panels(run: RunRecord) -> list[Panel]:
    """Every metric of one run per round."""
    return [
        Panel(f"{_short(label)}, mean over clients", "round", label, [line])
        for key, label in METRICS.items()
        if (line := _run_line(run, key, "mean over clients", positive=False)).points
    ]


def gradient_panel(run: RunRecord) -> Panel:
    """The gradient norms of B and A of one run per round."""
    norms = [_run_line(run, "grad_norm_b", "B", positive=True), _run_line(run, "grad_norm_a", "A", positive=True)]
    shown = [line for line in norms if line.points]
    whose = f" of {shown[0].method}" if len(shown) == 1 else ""
    return Panel(f"gradient norm{whose} at the first step of a round", "round", "L2 norm", shown, log_y=True)


def gain_panel(run: RunRecord) -> Panel:
    """The gain of one run per round."""
    line = _run_line(run, "gain", "mean over layers", positive=True)
    return Panel("gain", "round", GAIN, [line] if line.points else [])


def main_metric(cells: Sequence[CellRecord]) -> str:
    """Accuracy where it was measured, else the loss."""
    measured = [lookup(cell.summary, "last", "validation", "weighted", "accuracy") for cell in cells]
    return "accuracy" if any(number(value) is not None for value in measured) else "eval_loss"


def round_rows(
    cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord], metrics: Sequence[str], *, with_gain: bool = False
) -> list[list[Panel]]:
    """One row per size: the metrics, the gradient norm of B, and if asked for the gain; a line is a method."""
    varying = varying_keys(cells)
    rows = []
    for size, members in by_size(cells, varying).items():
        at = f": {size}" if size else ""

        def lines(key: str, own: Sequence[CellRecord] = members) -> list[Line]:
            return lines_by_round(own, varying, _reader(runs, key, positive=key not in METRICS))

        row = [
            Panel(f"{_short(METRICS[metric])}, mean over clients{at}", "round", METRICS[metric], lines(metric))
            for metric in metrics
        ]
        row.append(Panel(f"gradient of B{at}", "round", GRADIENT, lines("grad_norm_b"), log_y=True))
        if with_gain:
            row.append(Panel(f"gain{at}", "round", GAIN, lines("gain"), log_y=True))
        rows.append(row)
    return rows


def method_rows(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> list[list[Panel]]:
    """One row per method: gradient norm of B and gain per round; a line is a rank and a number of clients.

    Where a scaling is stable the lines of a panel lie on each other. Empty if there is one size only.
    """
    gradients = lines_by_method(cells, _reader(runs, "grad_norm_b", positive=True))
    gains = lines_by_method(cells, _reader(runs, "gain", positive=True))
    return [
        [
            Panel(f"gradient of B: {method}", "round", GRADIENT, lines, log_y=True),
            Panel(f"gain: {method}", "round", GAIN, gains.get(method, []), log_y=True),
        ]
        for method, lines in gradients.items()
        if len(lines) > 1
    ]


def size_rows(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord], metric: str) -> dict[str, list[Panel]]:
    """For rank and clients: the metric after the last round, its change, |grad B| and gain against that size."""

    def final(cell: CellRecord) -> float | None:
        return number(lookup(cell.summary, "last", "validation", "weighted", metric))

    def change(cell: CellRecord) -> float | None:
        end, start = final(cell), number(lookup(cell.summary, "initial", "validation", "weighted", metric))
        return end - start if end is not None and start is not None else None

    def at_gradient_round(key: str) -> Callable[[CellRecord], float | None]:
        read = _reader(runs, key, positive=True)
        return lambda cell: dict(read(cell)).get(GRADIENT_ROUND)

    rows = {}
    for key, x_label, name in ((RANK, "rank r", "rank"), (CLIENTS, "number of clients N", "clients")):
        ends, changes, norms, gains = (
            lines_against(key, cells, value)
            for value in (final, change, at_gradient_round("grad_norm_b"), at_gradient_round("gain"))
        )
        at = f"in round {GRADIENT_ROUND}"
        rows[name] = [
            Panel("after the last round", x_label, METRICS[metric], ends, log_x=True),
            Panel("change since the start", x_label, f"change of {METRICS[metric]}", changes, log_x=True),
            Panel(f"gradient of B {at}", x_label, GRADIENT, norms, log_x=True, log_y=True),
            Panel(f"gain {at}", x_label, GAIN, gains, log_x=True, log_y=True),
        ]
    return rows


def line_styles(panels: Sequence[Panel]) -> dict[tuple[str, str], tuple[int, int]]:
    """(method, size) -> index into PALETTE, number of its form; the same in all panels, and no two the same."""
    lines = [line for panel in panels for line in panel.lines]
    methods, sizes = (list(dict.fromkeys(names)) for names in ((x.method for x in lines), (x.size for x in lines)))
    turns = math.ceil(len(methods) / len(PALETTE))
    styles = {}
    for line in lines:
        turn, colour = divmod(methods.index(line.method), len(PALETTE))
        styles[line.method, line.size] = (colour, sizes.index(line.size) * turns + turn)
    return styles


def line_label(panel: Panel, line: Line) -> str:
    """Method and size; the slope where both axes are logarithmic and there are three points or more."""
    name = f"{line.method}, {line.size}" if line.size else line.method
    if not (panel.log_x and panel.log_y) or len(line.points) < 3:
        return name
    slope = fit_slope([(point[0], point[1]) for point in line.points])
    return f"{name} (slope {round(slope, 2) + 0.0:+.2f})"


def fit_slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of positive points in log-log coordinates."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = fmean(xs), fmean(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def _short(label: str) -> str:
    return label.split(" on ", 1)[0]


def _run_line(run: RunRecord, key: str, label: str, *, positive: bool) -> Line:
    return line_of_points(label, "", [_points(run, key, positive=positive)])


def _reader(
    runs: Mapping[Path, RunRecord], key: str, *, positive: bool
) -> Callable[[CellRecord], list[tuple[float, float]]]:
    return lambda cell: _points(runs.get(cell.run_dir), key, positive=positive)


def _points(run: RunRecord | None, key: str, *, positive: bool) -> list[tuple[float, float]]:
    """(round, value) of one metric; with `positive` only what a logarithmic axis can show."""
    points = run_points(run, key) if run is not None else []
    return [(float(at), value) for at, value in points if value > 0 or not positive]
