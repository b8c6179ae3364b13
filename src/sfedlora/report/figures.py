"""Which figures show a run and a comparison. How a line looks is in `plotting.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from sfedlora.errors import InputError
from sfedlora.report.load import CellRecord, RunRecord, cell_of_run, load_cells, load_run, lookup, number, run_points
from sfedlora.report.plotting import Panel, draw_panels
from sfedlora.report.series import CLIENTS, RANK, Line, line_of_points, lines_against, lines_by_round

__all__ = ["draw_comparison", "draw_directories", "draw_run"]

GRADIENT_ROUND = 2  # the first round in which every client starts from an averaged A and a trained B
METRICS = {
    "eval_loss": "loss on validation (nats)",
    "perplexity": "perplexity on validation",
    "accuracy": "accuracy on validation",
    "macro_f1": "macro-F1 on validation",
}
GRADIENT = "gradient norm of B at the first step"


def draw_run(run_dir: Path) -> list[Path]:
    """Draw one run: its metrics per round, and the gradient norms of B and A per round.

    Args:
        run_dir: a run directory with at least one finished round.

    Returns:
        The files written, in `run_dir/figures`.

    Raises:
        InputError: no run directory, no finished round, or matplotlib is missing.
        DataError: a damaged file.
        StorageError: a figure cannot be written.
    """
    run = load_run(run_dir)
    out_dir, name = run_dir / "figures", run_dir.resolve().name
    metrics = [
        Panel(label.split(" (")[0], "round", label, [line])
        for key, label in METRICS.items()
        if (line := _run_line(run, key, "mean over clients", positive=False)).points
    ]
    norms = [
        _run_line(run, "grad_norm_b", "B", positive=True),
        _run_line(run, "grad_norm_a", "A", positive=True),
    ]
    shown = [line for line in norms if line.points]
    gradient = Panel("gradient norm at the first step of a round", "round", "L2 norm", shown, log_y=True)
    drawn = [
        draw_panels(metrics, f"{name}: evaluation per round", out_dir / "metrics.png"),
        draw_panels([gradient], f"{name}: gradients per round", out_dir / "gradients.png"),
    ]
    return [path for path in drawn if path is not None]


def draw_comparison(cells: Sequence[CellRecord], out_dir: Path) -> list[Path]:
    """Draw a comparison: every cell per round; the last round's metric and |grad B| against rank and against clients.

    Args:
        cells: finished cells; those whose run directory is gone appear only in the figures made from summaries.
        out_dir: folder for the files, made if needed.

    Returns:
        The files written: `rounds.png`, `rank.png`, `clients.png`, each only if it has something to show.

    Raises:
        InputError: no cells, or matplotlib is missing.
        DataError: a damaged run directory.
        StorageError: a figure cannot be written.
    """
    if not cells:
        raise InputError("nothing to compare: no cells were given")
    runs = {cell.run_dir: load_run(cell.run_dir) for cell in cells if (cell.run_dir / "config.yaml").is_file()}
    metric = _main_metric(cells)
    drawn = [draw_panels(_round_panels(cells, runs, metric), "Every cell, round by round", out_dir / "rounds.png")]
    for key, x_label, name in ((RANK, "rank r", "rank"), (CLIENTS, "number of clients N", "clients")):
        panels = _size_panels(key, x_label, cells, runs, metric)
        drawn.append(draw_panels(panels, f"Dependence on the {x_label}", out_dir / f"{name}.png"))
    return [path for path in drawn if path is not None]


def draw_directories(directories: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Draw run directories and comparison directories (those with results.jsonl).

    Args:
        directories: what to draw; several run directories are compared as well.
        output: where figures over several runs go; None: `figures` in the comparison directory,
            or beside the first run.

    Returns:
        The files written.

    Raises:
        InputError: none given, a directory of neither kind, or matplotlib is missing.
        DataError: a damaged file.
        StorageError: a figure cannot be written.
    """
    if not directories:
        raise InputError("no directory was given; expected run directories or a comparison with results.jsonl")
    written: list[Path] = []
    runs: list[Path] = []
    for directory in directories:
        results = directory / "results.jsonl"
        if results.is_file():
            written += draw_comparison(load_cells(results), output or directory / "figures")
        else:
            runs.append(directory)
            written += draw_run(directory)
    if len(runs) > 1:
        cells = [cell_of_run(load_run(run)) for run in runs]
        written += draw_comparison(cells, output or runs[0].parent / "figures")
    return written


def _run_line(run: RunRecord, key: str, label: str, *, positive: bool) -> Line:
    points = [(float(x), y) for x, y in run_points(run, key) if y > 0 or not positive]
    return line_of_points(label, label, [points])


def _main_metric(cells: Sequence[CellRecord]) -> str:
    measured = [lookup(cell.summary, "last", "validation", "weighted", "accuracy") for cell in cells]
    return "accuracy" if any(number(value) is not None for value in measured) else "eval_loss"


def _round_panels(cells: Sequence[CellRecord], runs: dict[Path, RunRecord], metric: str) -> list[Panel]:
    def points(key: str, *, positive: bool) -> Callable[[CellRecord], Sequence[tuple[float, float]]]:
        def of_cell(cell: CellRecord) -> list[tuple[float, float]]:
            run = runs.get(cell.run_dir)
            return [(float(x), y) for x, y in run_points(run, key) if y > 0 or not positive] if run else []

        return of_cell

    lines = lines_by_round(cells, points(metric, positive=False))
    norms = lines_by_round(cells, points("grad_norm_b", positive=True))
    return [
        Panel("evaluation, mean over clients", "round", METRICS[metric], lines),
        Panel("collapse or not", "round", GRADIENT, norms, log_y=True),
    ]


def _size_panels(
    key: str, x_label: str, cells: Sequence[CellRecord], runs: dict[Path, RunRecord], metric: str
) -> list[Panel]:
    def final(cell: CellRecord) -> float | None:
        return number(lookup(cell.summary, "last", "validation", "weighted", metric))

    def gradient(cell: CellRecord) -> float | None:
        run = runs.get(cell.run_dir)
        at = dict(run_points(run, "grad_norm_b")).get(GRADIENT_ROUND) if run else None
        return at if at is not None and at > 0 else None

    norms = [_with_slope(line) for line in lines_against(key, cells, gradient)]
    return [
        Panel("after the last round", x_label, METRICS[metric], lines_against(key, cells, final), log_x=True),
        Panel(f"round {GRADIENT_ROUND}", x_label, GRADIENT, norms, log_x=True, log_y=True),
    ]


def _with_slope(line: Line) -> Line:
    """Add the least-squares slope in log-log coordinates to the label, from three points on."""
    if len(line.points) < 3:
        return line
    xs, ys = [math.log(point[0]) for point in line.points], [math.log(point[1]) for point in line.points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return Line(f"{line.label} (slope {slope:+.2f})", line.method, line.points)
