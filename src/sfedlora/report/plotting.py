"""Lines on panels, panels on a figure, a figure in a PNG file, with matplotlib (extra `report`).

A method has a colour, from a palette that colour-blind readers can tell apart (Okabe and Ito); a size has a dash and a
marker. Bands span the lowest to the highest seed. A panel without lines is not drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its lines and how they are shown."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


def draw_panels(panels: Sequence[Panel], title: str, path: Path) -> Path | None:
    """Write one figure with the panels that have lines; None where no panel has any.

    Raises:
        InputError: matplotlib is missing.
        StorageError: the file cannot be written.
    """
    shown = [panel for panel in panels if panel.lines]
    if not shown:
        return None
    styles = _styles(shown)
    figure = _new_figure(len(shown), max(len(panel.lines) for panel in shown))
    for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw_panel(axes, panel, styles)
    figure.suptitle(title, fontsize=13)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be made ({error.strerror})") from None
    write_bytes(path, content.getvalue())
    return path


def _new_figure(num_panels: int, num_lines: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib; install it with: pip install 'sfedlora[report]'") from None
    return Figure(figsize=(5.6 * num_panels, 4.2 + 0.22 * num_lines), layout="constrained")


def _styles(panels: Sequence[Panel]) -> dict[str, tuple[str, str, str]]:
    """Label (without slope) -> colour, dash, marker, the same in all panels of a figure."""
    methods: dict[str, list[str]] = {}
    for panel in panels:
        for line in panel.lines:
            labels = methods.setdefault(line.method, [])
            if _plain(line.label) not in labels:
                labels.append(_plain(line.label))
    return {
        label: (PALETTE[at % len(PALETTE)], DASHES[nth % len(DASHES)], MARKERS[(at + nth) % len(MARKERS)])
        for at, labels in enumerate(methods.values())
        for nth, label in enumerate(labels)
    }


def _plain(label: str) -> str:
    return label.split(" (slope ", maxsplit=1)[0]


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[str, tuple[str, str, str]]) -> None:
    for line in panel.lines:
        colour, dash, marker = styles[_plain(line.label)]
        xs, means, lows, highs = ([point[at] for point in line.points] for at in range(4))
        axes.plot(xs, means, dash, color=colour, marker=marker, markersize=4, linewidth=1.6, label=line.label)
        if lows != highs:
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    _scale_axes(axes, panel)
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(visible=True, which="major", alpha=0.3)
    if len(panel.lines) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8, frameon=False)


def _scale_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    values = sorted({point[0] for line in panel.lines for point in line.points})
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log_y:
        axes.set_yscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(plain)
        means = [point[1] for line in panel.lines for point in line.points]
        axes.yaxis.set_minor_formatter(plain if max(means) < 10 * min(means) else NullFormatter())
