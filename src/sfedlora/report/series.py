"""From cells to lines: which cells belong to one line, what it is called, its mean and its spread over seeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sfedlora.config.presets import PRESETS
from sfedlora.report.load import CellRecord

__all__ = [
    "CLIENTS",
    "RANK",
    "SEED",
    "Line",
    "by_size",
    "line_of_points",
    "lines_against",
    "lines_by_method",
    "lines_by_round",
    "method_label",
    "run_label",
    "varying_keys",
]

RANK, CLIENTS, SEED, PRESET = "lora.rank", "partition.num_clients", "seed", "preset"
# Follow from other settings, or do not change what is computed: never part of a label.
_DERIVED = frozenset({"gamma", "output", "lora.num_clients", "threads", "device", "runner", "workers"})
_RULE = ("method.name", "lora.scaling", "lora.init")
"""What a preset sets."""
_LONGEST_LIST, _MOST_RANKS = 6, 4
"""Entries of a list of ranks, and different ranks of a longer one, that a label spells out."""
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
    """The settings in which the cells differ, derived ones left out, in the order of the settings.

    The preset is among them if cells of several presets are compared.
    """
    keys = dict.fromkeys(key for cell in cells for key in cell.settings if key not in _DERIVED)
    return [key for key in keys if len({repr(cell.settings.get(key)) for cell in cells}) > 1]


def method_label(settings: Mapping[str, Any], varying: Sequence[str]) -> str:
    """Preset, or scaling and initialisation; and what else differs but ranks, clients and seeds.

    For example `sfed, independent init`, or where methods differ `fedit: rslora, shared init, lr = 0.01`. Where presets
    differ their names take the place of all that, unless a cell deviates from its own.
    """
    others = [key for key in varying if key not in (RANK, CLIENTS, SEED, PRESET, *_RULE)]
    parts = [_setting(key, settings.get(key)) for key in others]
    if PRESET in varying and _is_true_to_preset(settings):
        return ", ".join([str(settings[PRESET]), *parts])
    method, scaling, init = (settings.get(key) for key in _RULE)
    rule = [str(scaling)] if scaling is not None else []
    rule += [f"{init} init"] if init is not None else []
    prefix = f"{method}: " if "method.name" in varying else ""
    return (prefix + ", ".join([*rule, *parts])) or "run"


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


def lines_by_method(
    cells: Sequence[CellRecord], points: Callable[[CellRecord], Sequence[tuple[float, float]]]
) -> dict[str, list[Line]]:
    """For each method its lines by round, one per rank and number of clients, seeds joined."""
    varying = varying_keys(cells)
    groups: dict[str, list[Line]] = {}
    for size, members in by_size(cells, varying).items():
        for line in _group(members, varying, [], points):
            groups.setdefault(line.method, []).append(Line(size or line.method, "", line.points))
    return groups


def by_size(cells: Sequence[CellRecord], varying: Sequence[str]) -> dict[str, list[CellRecord]]:
    """The cells of each rank and number of clients, small ones first; the key names what varies: `r = 8, N = 4`."""
    sizes = [key for key in (RANK, CLIENTS) if key in varying]
    members: dict[str, list[CellRecord]] = {}
    for cell in sorted(cells, key=lambda cell: [_order(cell.settings.get(key)) for key in sizes]):
        members.setdefault(repr([cell.settings.get(key) for key in sizes]), []).append(cell)
    groups: dict[str, list[CellRecord]] = {}
    for own in members.values():
        label = _size_label(own[0], sizes)
        same = sum(other == label or other.startswith(f"{label} #") for other in groups)  # long lists are abbreviated
        groups[f"{label} #{same + 1}" if same else label] = own
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


def _order(size: Any) -> tuple[bool, tuple[float, ...]]:
    """Numbers by size, then lists."""
    if isinstance(size, list):
        return True, tuple(size)
    return not isinstance(size, int | float), (float(size) if isinstance(size, int | float) else 0.0,)


def _setting(key: str, value: Any) -> str:
    short = _SHORT.get(key, key.rsplit(".", 1)[-1].replace("_", " "))
    if isinstance(value, float):
        shown = f"{value:g}"
    elif isinstance(value, list) and key == RANK and len(value) > _LONGEST_LIST:
        counts = sorted(Counter(value).items())
        spelled = " + ".join(f"{count} x {rank}" for rank, count in counts)
        shown = spelled if len(counts) <= _MOST_RANKS else f"{min(value)} to {max(value)} ({len(value)} clients)"
    else:
        shown = str(value)
    return f"{short} = {shown}" if short else shown


def _is_true_to_preset(settings: Mapping[str, Any]) -> bool:
    """Whether method, scaling and initialisation are the preset's."""
    preset = PRESETS.get(str(settings.get(PRESET)))
    if preset is None:
        return False
    brought = {f"{section}.{key}": value for section, keys in preset.items() for key, value in keys.items()}
    return all(settings.get(key) == value for key, value in brought.items())
