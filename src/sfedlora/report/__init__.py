"""Figures of runs and comparisons, drawn from their directories alone. No training code is needed to read them."""

from __future__ import annotations

from sfedlora.report.figures import draw_comparison as draw_comparison
from sfedlora.report.figures import draw_directories as draw_directories
from sfedlora.report.figures import draw_run as draw_run
from sfedlora.report.load import CellRecord as CellRecord
from sfedlora.report.load import RunRecord as RunRecord
from sfedlora.report.load import load_cells as load_cells
from sfedlora.report.load import load_run as load_run

__all__ = [
    "CellRecord",
    "RunRecord",
    "draw_comparison",
    "draw_directories",
    "draw_run",
    "load_cells",
    "load_run",
]
