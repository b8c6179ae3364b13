"""Lines on panels, panels on a figure, a figure in a PNG file, with matplotlib (extra `report`).

A method has a colour, from a palette that colour-blind readers can tell apart (Okabe and Ito); a size has a dash and a
marker, and so has a method beyond the number of colours. Bands span the lowest to the highest seed. A panel without
lines is not drawn.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from sfedlora.errors import InputError, StorageError
from sfedlora.report.series import Line
from sfedlora.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "draw_panels"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEGEND_ROWS, LEGEND_LETTERS = 6, 34
"""A longer legend has two columns if its labels have no more letters than this."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its lines and how they are shown."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


def draw_panels(rows: Sequence[Sequence[Panel]], title: str, path: Path) -> Path | None:
    """Write one figure with the panels that have lines, row by row; None where no panel has any.

    Raises:
        InputError: matplotlib is missing.
        StorageError: the file cannot be written.
    """
    shown = [row for row in ([panel for panel in row if panel.lines] for row in rows) if row]
    if not shown:
        return None
    styles = _styles([panel for row in shown for panel in row])
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be made ({error.strerror})") from None
    write_bytes(path, content.getvalue())


def _styles(panels: Sequence[Panel]) -> dict[tuple[str, str], tuple[str, str, str]]:
    """(method, size) -> colour, dash, marker: the same in all panels of a figure, and no two the same."""
    lines = [line for panel in panels for line in panel.lines]
    methods, sizes = (list(dict.fromkeys(names)) for names in ((x.method for x in lines), (x.size for x in lines)))
    turns = math.ceil(len(methods) / len(PALETTE))
    styles = {}
    for line in lines:
        turn, colour = divmod(methods.index(line.method), len(PALETTE))
        form = sizes.index(line.size) * turns + turn
        styles[line.method, line.size] = (
            PALETTE[colour],
            DASHES[form % len(DASHES)],
            MARKERS[form % len(MARKERS)],
        )
    return styles


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[tuple[str, str], tuple[str, str, str]]) -> None:
    for line in panel.lines:
        colour, dash, marker = styles[line.method, line.size]
        xs, means, lows, highs = ([point[at] for point in line.points] for at in range(4))
        label = _label(panel, line)
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


def _label(panel: Panel, line: Line) -> str:
    return (f"{line.method}, {line.size}" if line.size else line.method) + _slope_text(panel, line)


def _legend_columns(panel: Panel) -> int:
    longest = max(len(_label(panel, line)) for line in panel.lines)
    return 2 if len(panel.lines) > LEGEND_ROWS and longest <= LEGEND_LETTERS else 1


def _slope_text(panel: Panel, line: Line) -> str:
    """The least-squares slope where both axes are logarithmic and there are three points or more."""
    if not (panel.log_x and panel.log_y) or len(line.points) < 3:
        return ""
    xs, ys = [math.log(point[0]) for point in line.points], [math.log(point[1]) for point in line.points]
    mean_x, mean_y = fmean(xs), fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return f" (slope {round(slope, 2) + 0.0:+.2f})"


def _scale_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    points = [point for line in panel.lines for point in line.points]
    if panel.log_x:
        values = sorted({point[0] for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log_y:
        decades = math.log10(max(point[3] for point in points) / min(point[2] for point in points))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
