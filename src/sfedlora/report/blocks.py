"""What a page is made of: tables, bars, dots and panels of lines, under headings. Plain values, nothing escaped yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfedlora.report.panels import Panel

__all__ = ["Bars", "Block", "Dots", "Grid", "Note", "Section", "Table"]


@dataclass(frozen=True)
class Table:
    """A sortable table.

    Attributes:
        columns: headings.
        rows: one value per column; numbers are shown with five digits and sort by size, None is shown as a dash.
        caption: one line above it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Bars:
    """Stacked bars.

    Attributes:
        title: above the bars.
        value_label: of the value axis.
        names: one per bar.
        series: name of a part -> its value in every bar.
        sideways: whether bars lie, for names that are long.
        signed: whether a bar's colour tells its sign (one part only).
    """

    title: str
    value_label: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    sideways: bool = False
    signed: bool = False


@dataclass(frozen=True)
class Dots:
    """One row of dots per group: (name of a dot, value)."""

    title: str
    value_label: str
    groups: Mapping[str, Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class Grid:
    """Charts side by side where there is room."""

    charts: Sequence[Panel | Bars | Dots]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str


Block = Table | Grid | Note


@dataclass(frozen=True)
class Section:
    """A heading and what is below it; closed ones open with a click."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    is_open: bool = True
