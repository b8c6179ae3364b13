"""Lines on panels, panels on a figure, a figure in a PNG file, with matplotlib (extra `report`).

Bands span the lowest to the highest seed. A panel without lines is not drawn.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfedlora.errors import InputError
from sfedlora.report.panels import PALETTE, Panel, line_label, line_styles
from sfedlora.storage import make_directory, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_panels"]

DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_TICKS = 6
LEGEND_ROWS, LEGEND_LETTERS = 6, 34
"""A longer legend has two columns if its labels have no more letters than this."""


def draw_panels(rows: Sequence[Sequence[Panel]], title: str, path: Path) -> Path | None:
    """Write one figure with the panels that have lines, row by row; None where no panel has any.

    Raises:
        InputError: matplotlib is missing.
        StorageError: the file cannot be written.
    """
    shown = [row for row in ([panel for panel in row if panel.lines] for row in rows) if row]
    if not shown:
        return None
    styles = line_styles([panel for row in shown for panel in row])
    figure = _new_figure(shown)
    grid = figure.subplots(len(shown), max(map(len, shown)), squeeze=False)
    for at, row in enumerate(shown):
        for axes, panel in zip(grid[at], row, strict=False):
            _draw_panel(axes, panel, styles)
        for axes in grid[at][len(row) :]:
            axes.set_visible(False)
    figure.suptitle(textwrap.fill(title, 55 * len(grid[0])), fontsize=13)
    _save(figure, path)
    return path


def _new_figure(rows: Sequence[Sequence[Panel]]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib; install it with: pip install 'sfedlora[report]'") from None
    lines = [max(math.ceil(len(panel.lines) / _legend_columns(panel)) for panel in row) for row in rows]
    height = sum(3.4 + (0.2 * count + 0.2 if count > 1 else 0.0) for count in lines) + 0.4
    figure = Figure(figsize=(5.6 * max(map(len, rows)), height))
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.1)
    return figure


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    make_directory(path.parent)
    write_bytes(path, content.getvalue())


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[tuple[str, str], tuple[int, int]]) -> None:
    for line in panel.lines:
        colour_index, form = styles[line.method, line.size]
        colour, dash, marker = PALETTE[colour_index], DASHES[form % len(DASHES)], MARKERS[form % len(MARKERS)]
        xs, means, lows, highs = ([point[at] for point in line.points] for at in range(4))
        label = line_label(panel, line)
        axes.plot(xs, means, dash, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
        if lows != highs:
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.1, linewidth=0)
    _scale_axes(axes, panel)
    axes.set_title(panel.title, fontsize=11)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(visible=True, which="major", alpha=0.3)
    if len(panel.lines) > 1:
        columns = _legend_columns(panel)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=8, frameon=False, ncols=columns)


def _legend_columns(panel: Panel) -> int:
    longest = max(len(line_label(panel, line)) for line in panel.lines)
    return 2 if len(panel.lines) > LEGEND_ROWS and longest <= LEGEND_LETTERS else 1


def _scale_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    points = [point for line in panel.lines for point in line.points]
    if panel.log_x:
        values = sorted({point[0] for point in points})
        shown = values[:: math.ceil(len(values) / MOST_TICKS)]
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown, [f"{value:.3g}" if value < 1 else f"{value:g}" for value in shown])
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log_y:
        decades = math.log10(max(point[3] for point in points) / min(point[2] for point in points))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
