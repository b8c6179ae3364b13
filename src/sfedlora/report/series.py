"""From cells to lines: which cells belong to one line, what it is called, its mean and its spread over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sfedlora.report.load import CellRecord

__all__ = [
    "CLIENTS",
    "RANK",
    "SEED",
    "Line",
    "by_size",
    "line_of_points",
    "lines_against",
    "lines_by_round",
    "method_label",
    "run_label",
    "varying_keys",
]

RANK, CLIENTS, SEED = "lora.rank", "partition.num_clients", "seed"
# Follow from other settings, or do not change what is computed: never part of a label.
_DERIVED = frozenset({"gamma", "output", "preset", "lora.num_clients", "threads", "device", "runner"})
_SHORT = {"lora.alpha": "alpha", "local.learning_rate": "lr", "local.optimizer": "", RANK: "r", CLIENTS: "N"}


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        method: scaling, initialisation and what else differs; decides the colour.
        size: the rank or the number of clients where several are drawn, else empty; decides dash and marker.
        points: (x, mean, lowest, highest) over seeds, by x.
    """

    method: str
    size: str
    points: tuple[tuple[float, float, float, float], ...]


def varying_keys(cells: Sequence[CellRecord]) -> list[str]:
    """The settings in which the cells differ, derived ones left out, in the order of the settings."""
    keys = dict.fromkeys(key for cell in cells for key in cell.settings if key not in _DERIVED)
    return [key for key in keys if len({repr(cell.settings.get(key)) for cell in cells}) > 1]


def method_label(settings: Mapping[str, Any], varying: Sequence[str]) -> str:
    """Scaling and initialisation, the method where methods differ, and what else differs but ranks, clients, seeds.

    For example `sfed, independent init` or `fedit: rslora, shared init, lr = 0.01`.
    """
    method, scaling, init = (settings.get(key) for key in ("method.name", "lora.scaling", "lora.init"))
    parts = [str(scaling)] if scaling is not None else []
    parts += [f"{init} init"] if init is not None else []
    named = {RANK, CLIENTS, SEED, "method.name", "lora.scaling", "lora.init"}
    parts += [_setting(key, settings.get(key)) for key in varying if key not in named]
    prefix = f"{method}: " if "method.name" in varying else ""
    return (prefix + ", ".join(parts)) or "run"


def run_label(settings: Mapping[str, Any]) -> str:
    """What one run is, for a title: `fedsa: sfed, independent init, r = 8, N = 4`."""
    sizes = [_setting(key, settings[key]) for key in (RANK, CLIENTS) if settings.get(key) is not None]
    return ", ".join([method_label(settings, ["method.name"]), *sizes])


def line_of_points(method: str, size: str, runs: Iterable[Iterable[tuple[float, float]]]) -> Line:
    """Join the points of several seeds: mean, lowest and highest value at each x."""
    at: defaultdict[float, list[float]] = defaultdict(list)
    for points in runs:
        for x, value in points:
            at[x].append(value)
    joined = tuple((x, fmean(values), min(values), max(values)) for x, values in sorted(at.items()))
    return Line(method, size, joined)


def lines_by_round(
    cells: Sequence[CellRecord],
    varying: Sequence[str],
    points: Callable[[CellRecord], Sequence[tuple[float, float]]],
) -> list[Line]:
    """One line per method over cells of one size, seeds joined; `varying` is what differs in the whole comparison."""
    return _group(cells, varying, [], points)


def by_size(cells: Sequence[CellRecord], varying: Sequence[str]) -> dict[str, list[CellRecord]]:
    """The cells of each rank and number of clients, small ones first; the key names what varies: `r = 8, N = 4`."""
    sizes = [key for key in (RANK, CLIENTS) if key in varying]
    groups: dict[str, list[CellRecord]] = {}
    for cell in sorted(cells, key=lambda cell: [_order(cell.settings.get(key)) for key in sizes]):
        groups.setdefault(_size_label(cell, sizes), []).append(cell)
    return groups


def lines_against(key: str, cells: Sequence[CellRecord], value: Callable[[CellRecord], float | None]) -> list[Line]:
    """One line per method and per value of the other size, against a rank or a number of clients.

    Lines with a single x are left out: they show no dependence.
    """
    varying = varying_keys(cells)
    sizes = [size for size in (RANK, CLIENTS) if size in varying and size != key]

    def points(cell: CellRecord) -> list[tuple[float, float]]:
        x, y = cell.settings.get(key), value(cell)
        return [(float(x), y)] if isinstance(x, int) and x > 0 and y is not None else []

    return [line for line in _group(cells, varying, sizes, points) if len(line.points) > 1]


def _group(
    cells: Sequence[CellRecord],
    varying: Sequence[str],
    sizes: Sequence[str],
    points: Callable[[CellRecord], Sequence[tuple[float, float]]],
) -> list[Line]:
    methods = dict.fromkeys(method_label(cell.settings, varying) for cell in cells)
    groups: dict[tuple[str, str], list[CellRecord]] = {}
    for size, members in by_size(cells, sizes).items():
        for cell in members:
            groups.setdefault((method_label(cell.settings, varying), size), []).append(cell)
    lines = [line_of_points(method, size, [points(cell) for cell in group]) for (method, size), group in groups.items()]
    return sorted((line for line in lines if line.points), key=lambda line: list(methods).index(line.method))


def _size_label(cell: CellRecord, sizes: Sequence[str]) -> str:
    return ", ".join(_setting(key, cell.settings.get(key)) for key in sizes)


def _order(size: Any) -> tuple[bool, float]:
    is_number = isinstance(size, int | float)
    return (not is_number, float(size) if is_number else 0.0)


def _setting(key: str, value: Any) -> str:
    short = _SHORT.get(key, key.rsplit(".", 1)[-1].replace("_", " "))
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{short} = {shown}" if short else shown
