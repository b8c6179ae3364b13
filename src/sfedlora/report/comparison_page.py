"""What the page of a comparison says, section by section; cells that are not finished are there with what they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sfedlora.report.blocks import Block, Dots, Grid, Note, Section, Table
from sfedlora.report.load import CellRecord, RunRecord, lookup, run_points
from sfedlora.report.panels import GRADIENT_ROUND, METRICS, main_metric, method_rows, round_rows, size_rows
from sfedlora.report.run_page import (
    MEGABYTE,
    PHASES,
    SHORT,
    TRAFFIC,
    client_changes,
    exclusion_rows,
    phase_totals,
    settings_section,
    status_of,
)
from sfedlora.report.series import varying_keys

__all__ = ["comparison_facts", "comparison_sections"]

MOST_DOTS = 100
"""Cells of which single clients are drawn; the table has all."""


def comparison_sections(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> list[Section]:
    """Everything that is known about a comparison.

    Args:
        cells: its cells, finished or not.
        runs: the run directories that are there, by path.
    """
    metric = main_metric(cells)
    finished = [cell for cell in cells if cell.summary]
    sections = [Section("Results", _result_blocks(cells, runs))]
    for name, panels in size_rows(finished, runs, metric).items():
        shown = [panel for panel in panels if panel.lines]
        if shown:
            title = "Against the rank r" if name == "rank" else "Against the number of clients N"
            sections.append(Section(title, [Grid(shown)]))
    sections += _row_sections(cells, runs)
    sections += [
        Section("Clients", _client_blocks(cells, runs)),
        Section("Time and traffic", [_cost_table(cells, runs)]),
        Section("Excluded clients", _exclusion_blocks(cells, runs)),
    ]
    first = next((runs[cell.run_dir] for cell in cells if cell.run_dir in runs), None)
    return [*sections, settings_section(first, "Settings and environment of the first cell")] if first else sections


def comparison_facts(cells: Sequence[CellRecord]) -> list[tuple[str, str]]:
    """How many cells, and what differs between them."""
    finished = sum(bool(cell.summary) for cell in cells)
    facts = [("cells finished", f"{finished} of {len(cells)} begun")]
    for key in varying_keys(cells):
        values = dict.fromkeys(_value(cell.settings.get(key)) for cell in cells)
        facts.append((key, ", ".join(values)))
    return facts


def _result_blocks(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> list[Block]:
    varying = varying_keys(cells)
    names = [
        name
        for name in SHORT
        if any(lookup(cell.summary, "last", "test", "weighted", name) is not None for cell in cells)
    ]
    columns = ["cell", *varying, "gamma"]
    columns += [f"test {SHORT[name]}, {when}" for name in names for when in ("initial", "last", "best")]
    columns += [f"|grad B|, round {GRADIENT_ROUND}", f"gain, round {GRADIENT_ROUND}", "state"]
    rows = []
    for cell in cells:
        run = runs.get(cell.run_dir)
        second = [dict(run_points(run, key)).get(GRADIENT_ROUND) if run else None for key in ("grad_norm_b", "gain")]
        rows.append(
            [
                cell.cell,
                *(_plain(cell.settings.get(key)) for key in varying),
                _plain(cell.settings.get("gamma")),
                *(
                    lookup(cell.summary, when, "test", "weighted", name)
                    for name in names
                    for when in ("initial", "last", "best")
                ),
                *second,
                _state(cell, run),
            ]
        )
    caption = "Means over the clients' test splits, weighted by examples; best is chosen on validation."
    return [Table(columns, rows, caption)]


def _row_sections(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> list[Section]:
    metrics = [key for key in METRICS if any(run_points(run, key) for run in runs.values())]
    by_size, by_method = (
        [Grid(shown) for row in rows if (shown := [panel for panel in row if panel.lines])]
        for rows in (round_rows(cells, runs, metrics, with_gain=True), method_rows(cells, runs))
    )
    sections = [Section("Round by round, methods together", by_size)] if by_size else []
    if by_method:
        note = Note("Where a scaling is stable, the lines of all ranks and numbers of clients lie on each other.")
        sections.append(Section("Round by round, ranks and numbers of clients together", [note, *by_method]))
    return sections


def _client_blocks(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> list[Block]:
    groups: dict[str, list[tuple[str, float]]] = {}
    rows = []
    for cell in cells:
        run = runs.get(cell.run_dir)
        changes = [(client, last - first) for client, first, last in client_changes(run)] if run else []
        if not changes:
            continue
        values = [value for _, value in changes]
        if len(groups) < MOST_DOTS:
            groups[cell.cell] = changes
        worse = sum(value > 0 for value in values)
        best, worst = changes[0], changes[-1]
        rows.append([cell.cell, len(values), worse, median(values), best[0], best[1], worst[0], worst[1]])
    if not rows:
        return [Note("Nothing is known about single clients.")]
    title = "Change of each client's validation loss since the initial model"
    columns = ("cell", "clients", "worse off", "median change", "gains most", "its change", "gains least", "its change")
    return [Grid([Dots(title, "change (nats), below 0 is better", groups)]), Table(columns, rows)]


def _cost_table(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> Table:
    rows = []
    for cell in cells:
        if cell.run_dir in runs:
            totals = phase_totals(runs[cell.run_dir])
            rows.append([cell.cell, *(totals[key] for key in PHASES), *(totals[key] / MEGABYTE for key in TRAFFIC)])
    columns = ["cell", *(f"{name} (s)" for name in PHASES.values()), *(f"{name} (MB)" for name in TRAFFIC.values())]
    return Table(columns, rows, "Sums over the rounds so far")


def _exclusion_blocks(cells: Sequence[CellRecord], runs: Mapping[Path, RunRecord]) -> list[Block]:
    rows = [(cell.cell, *row) for cell in cells if cell.run_dir in runs for row in exclusion_rows(runs[cell.run_dir])]
    return [Table(("cell", "round", "client", "reason"), rows)] if rows else [Note("No client was excluded.")]


def _state(cell: CellRecord, run: RunRecord | None) -> str:
    if run is not None:
        return status_of(run)
    return "finished; its directory is gone" if cell.summary else "unknown"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) or value is None else _value(value)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
