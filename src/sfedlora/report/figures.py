"""Which figures show a run and a comparison. How a line looks is in `plotting.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfedlora.errors import InputError
from sfedlora.report.load import CellRecord, RunRecord, cell_of_run, load_cells, load_run, lookup, number, run_points
from sfedlora.report.plotting import Panel, draw_panels
from sfedlora.report.series import (
    CLIENTS,
    RANK,
    Line,
    by_size,
    line_of_points,
    lines_against,
    lines_by_round,
    run_label,
    varying_keys,
)

__all__ = ["draw_comparison", "draw_directories", "draw_run"]

GRADIENT_ROUND = 2  # the first round in which every client starts from an averaged A and a trained B
METRICS = {
    "eval_loss": "loss on validation (nats)",
    "perplexity": "perplexity on validation",
    "accuracy": "accuracy on validation",
    "macro_f1": "macro-F1 on validation",
}
ROWS_PER_PAGE = 4
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
    out_dir, name = run_dir / "figures", run_label(run.settings)
    metrics = [
        Panel("mean over clients", "round", label, [line])
        for key, label in METRICS.items()
        if (line := _run_line(run, key, "mean over clients", positive=False)).points
    ]
    norms = [
        _run_line(run, "grad_norm_b", "B", positive=True),
        _run_line(run, "grad_norm_a", "A", positive=True),
    ]
    shown = [line for line in norms if line.points]
    whose = f" of {shown[0].method}" if len(shown) == 1 else ""
    gradient = Panel(f"gradient norm{whose} at the first step of a round", "round", "L2 norm", shown, log_y=True)
    drawn = [
        draw_panels([metrics], f"{name}: evaluation per round", out_dir / "metrics.png"),
        draw_panels([[gradient]], f"{name}: gradients per round", out_dir / "gradients.png"),
    ]
    return [path for path in drawn if path is not None]


def draw_comparison(cells: Sequence[CellRecord], out_dir: Path) -> list[Path]:
    """Draw a comparison: every cell per round; the last round's metric and |grad B| against rank and against clients.

    Args:
        cells: finished cells; those whose run directory is gone appear only in the figures made from summaries.
        out_dir: folder for the files, made if needed.

    Returns:
        The files written: `rounds.png` (`rounds-2.png`, ... where there are many sizes), `rank.png`, `clients.png`,
        each only if it has something to show.

    Raises:
        InputError: no cells, or matplotlib is missing.
        DataError: a damaged run directory.
        StorageError: a figure cannot be written.
    """
    if not cells:
        raise InputError("nothing to compare: no cells were given")
    runs = {cell.run_dir: load_run(cell.run_dir) for cell in cells if (cell.run_dir / "config.yaml").is_file()}
    metric = _main_metric(cells)
    rows = _round_rows(cells, runs, metric)
    drawn: list[Path | None] = []
    for page, start in enumerate(range(0, len(rows), ROWS_PER_PAGE), start=1):
        name = "rounds.png" if page == 1 else f"rounds-{page}.png"
        drawn.append(draw_panels(rows[start : start + ROWS_PER_PAGE], "Every cell, round by round", out_dir / name))
    for key, x_label, name in ((RANK, "rank r", "rank"), (CLIENTS, "number of clients N", "clients")):
        panels = _size_panels(key, x_label, cells, runs, metric)
        drawn.append(draw_panels([panels], f"Dependence on the {x_label}", out_dir / f"{name}.png"))
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
    points = _points(run, key, positive=positive)
    return line_of_points(label, "", [points])


def _main_metric(cells: Sequence[CellRecord]) -> str:
    measured = [lookup(cell.summary, "last", "validation", "weighted", "accuracy") for cell in cells]
    return "accuracy" if any(number(value) is not None for value in measured) else "eval_loss"


def _round_rows(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord], metric: str) -> list[list[Panel]]:
    """One row per size: the metric and the gradient norm of B."""

    def metric_points(cell: CellRecord) -> list[tuple[float, float]]:
        return _points(runs.get(cell.run_dir), metric, positive=False)

    def gradient_points(cell: CellRecord) -> list[tuple[float, float]]:
        return _points(runs.get(cell.run_dir), "grad_norm_b", positive=True)

    varying = varying_keys(cells)
    rows = []
    for size, members in by_size(cells, varying).items():
        at = f": {size}" if size else ""
        lines, norms = (lines_by_round(members, varying, points) for points in (metric_points, gradient_points))
        rows.append(
            [
                Panel(f"mean over clients{at}", "round", METRICS[metric], lines),
                Panel(f"gradient of B{at}", "round", GRADIENT, norms, log_y=True),
            ]
        )
    return rows


def _size_panels(
    key: str, x_label: str, cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord], metric: str
) -> list[Panel]:
    def final(cell: CellRecord) -> float | None:
        return number(lookup(cell.summary, "last", "validation", "weighted", metric))

    def change(cell: CellRecord) -> float | None:
        end, start = final(cell), number(lookup(cell.summary, "initial", "validation", "weighted", metric))
        return end - start if end is not None and start is not None else None

    def gradient(cell: CellRecord) -> float | None:
        return dict(_points(runs.get(cell.run_dir), "grad_norm_b", positive=True)).get(GRADIENT_ROUND)

    ends, changes, norms = (lines_against(key, cells, value) for value in (final, change, gradient))
    return [
        Panel("after the last round", x_label, METRICS[metric], ends, log_x=True),
        Panel("change since the start", x_label, f"change of {METRICS[metric]}", changes, log_x=True),
        Panel(f"gradient of B in round {GRADIENT_ROUND}", x_label, GRADIENT, norms, log_x=True, log_y=True),
    ]


def _points(run: RunRecord | None, key: str, *, positive: bool) -> list[tuple[float, float]]:
    """(round, value) of one metric; with `positive` only what a logarithmic axis can show."""
    points = run_points(run, key) if run is not None else []
    return [(float(at), value) for at, value in points if value > 0 or not positive]
