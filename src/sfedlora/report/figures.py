"""Which PNG figures show a run and a comparison. What is on them is in `panels.py`, how it looks in `plotting.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfedlora.errors import InputError
from sfedlora.report.load import CellRecord, cell_of_run, load_cells, load_run
from sfedlora.report.panels import gradient_panel, loss_panels, main_metric, round_rows, size_rows
from sfedlora.report.plotting import draw_panels
from sfedlora.report.series import run_label

__all__ = ["draw_comparison", "draw_directories", "draw_run"]

ROWS_PER_PAGE = 4
PANELS_PER_SIZE = 3


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
    drawn = [
        draw_panels([loss_panels(run)], f"{name}: evaluation per round", out_dir / "metrics.png"),
        draw_panels([[gradient_panel(run)]], f"{name}: gradients per round", out_dir / "gradients.png"),
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
    metric = main_metric(cells)
    rows = round_rows(cells, runs, [metric])
    drawn: list[Path | None] = []
    for page, start in enumerate(range(0, len(rows), ROWS_PER_PAGE), start=1):
        name = "rounds.png" if page == 1 else f"rounds-{page}.png"
        drawn.append(draw_panels(rows[start : start + ROWS_PER_PAGE], "Every cell, round by round", out_dir / name))
    for name, panels in size_rows(cells, runs, metric).items():
        title = f"Dependence on the {panels[0].x_label}"
        drawn.append(draw_panels([panels[:PANELS_PER_SIZE]], title, out_dir / f"{name}.png"))
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
