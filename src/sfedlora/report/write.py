"""Write report.html of run directories and comparisons: which pages there are, and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfedlora.errors import InputError
from sfedlora.report.comparison_page import comparison_facts, comparison_sections
from sfedlora.report.load import CellRecord, RunRecord, cell_of_run, load_cells, load_run, unfinished_runs
from sfedlora.report.page import Page, plotly_source, render
from sfedlora.report.run_page import facts_of, run_sections, status_of
from sfedlora.report.series import run_label
from sfedlora.storage import make_directory, write_bytes

__all__ = ["page_of", "write_reports"]

NAME = "report.html"
Answers = Sequence[Mapping[str, str]]


def write_reports(
    directories: Sequence[Path], output: Path | None = None, answers: Mapping[Path, Answers] | None = None
) -> list[Path]:
    """Write one page per run or comparison, and one over several runs.

    Args:
        directories: run directories, and folders of a comparison.
        output: folder of the page over several runs; None: beside the first run.
        answers: sample generations of run directories.

    Returns:
        The files: `report.html` in every directory, and the one over several runs.

    Raises:
        InputError: none given, a directory of neither kind, or plotly is missing.
        DataError: a damaged file.
        StorageError: a page cannot be written.
    """
    if not directories:
        raise InputError("no directory was given; expected run directories or a comparison with results.jsonl")
    plotly = plotly_source()
    pages = {directory / NAME: page_of(directory, (answers or {}).get(directory, ())) for directory in directories}
    runs = [directory for directory in directories if (directory / "config.yaml").is_file()]
    if len(runs) > 1:
        loaded = {run: load_run(run, may_be_empty=True) for run in runs}
        folder = output or runs[0].parent
        cells = [cell_of_run(run) for run in loaded.values()]
        pages[folder / NAME] = _comparison(f"{len(runs)} runs", cells, loaded)
    for path, page in pages.items():
        make_directory(path.parent)
        write_bytes(path, render(page, plotly=plotly).encode())
    return list(pages)


def page_of(directory: Path, answers: Answers = ()) -> Page:
    """The page of a run directory, or of a comparison's folder; either may still be going on.

    Raises:
        InputError: it is neither.
        StorageError: a damaged file.
    """
    if (directory / "config.yaml").is_file():
        run = load_run(directory, may_be_empty=True)
        title = f"{directory.resolve().name}: {run_label(run.settings)}"
        return Page(title, status_of(run), facts_of(run), run_sections(run, answers))
    results = directory / "results.jsonl"
    cells = load_cells(results) if results.is_file() else []
    begun = [cell_of_run(load_run(run, may_be_empty=True)) for run in unfinished_runs(directory)]
    known = {cell.run_dir.resolve() for cell in cells}
    cells += [cell for cell in begun if cell.run_dir.resolve() not in known]
    if not cells:
        raise InputError(
            f"{directory}: no run directory (config.yaml is missing) and no comparison (no results.jsonl, no cells); "
            "give a folder that `run` or `compare` wrote"
        )
    present = [cell.run_dir for cell in cells if (cell.run_dir / "config.yaml").is_file()]
    runs = {path: load_run(path, may_be_empty=True) for path in present}
    return _comparison(f"Comparison {directory.resolve().name}", cells, runs)


def _comparison(title: str, cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> Page:
    going_on = sum(not cell.summary for cell in cells)
    status = f"{len(cells) - going_on} finished, {going_on} not finished" if going_on else f"{len(cells)} finished"
    return Page(title, status, comparison_facts(cells), comparison_sections(cells, runs))
