"""Pages and figures of runs and comparisons, made from their directories alone, without any training code."""

from __future__ import annotations

from sfedlora.report.figures import draw_comparison as draw_comparison
from sfedlora.report.figures import draw_directories as draw_directories
from sfedlora.report.figures import draw_run as draw_run
from sfedlora.report.load import CellRecord as CellRecord
from sfedlora.report.load import RunRecord as RunRecord
from sfedlora.report.load import has_finished_rounds as has_finished_rounds
from sfedlora.report.load import load_cells as load_cells
from sfedlora.report.load import load_run as load_run
from sfedlora.report.write import write_reports as write_reports

__all__ = [
    "CellRecord",
    "RunRecord",
    "draw_comparison",
    "draw_directories",
    "draw_run",
    "has_finished_rounds",
    "load_cells",
    "load_run",
    "write_reports",
]
