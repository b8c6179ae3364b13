"""Read back what `run` and `compare` wrote: run directories and results.jsonl. Keys that are not known are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfedlora.config.flatten import flatten
from sfedlora.config.yaml_file import read_yaml
from sfedlora.errors import DataError, InputError, StorageError
from sfedlora.storage import read_record, read_records

__all__ = [
    "CellRecord",
    "RunRecord",
    "cell_of_run",
    "has_finished_rounds",
    "initial_clients",
    "load_cells",
    "load_environment",
    "load_run",
    "load_split_sizes",
    "run_points",
    "unfinished_runs",
]

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RunRecord:
    """One run directory; the run may still be going on.

    Attributes:
        path: the directory.
        settings: dotted key -> value of config.yaml.
        rounds: the lines of metrics.jsonl, by round.
        summary: content of summary.json; empty while the run is not finished.
    """

    path: Path
    settings: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class CellRecord:
    """One line of results.jsonl.

    Attributes:
        cell: name of the cell.
        settings: dotted key -> value.
        run_dir: where its run directory lies.
        summary: content of the run's summary.json.
    """

    cell: str
    settings: Mapping[str, Any]
    run_dir: Path
    summary: Mapping[str, Any]


def load_run(run_dir: Path, *, may_be_empty: bool = False) -> RunRecord:
    """Read a run directory.

    Args:
        run_dir: the directory.
        may_be_empty: whether a run without a finished round is read, too.

    Raises:
        InputError: it is no run directory, or no round has finished yet.
        StorageError: one of its files is damaged.
    """
    config, metrics, summary = (run_dir / name for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    if not config.is_file():
        raise InputError(f"{run_dir}: no run directory (config.yaml is missing); give a folder that `run` wrote")
    rounds = read_records(metrics, {"round_num": int}) if metrics.is_file() else []
    if not rounds and not may_be_empty:
        raise InputError(f"{run_dir}: no round has finished yet (metrics.jsonl is missing or empty)")
    content = read_record(summary, {}) if summary.is_file() else {}
    ordered = tuple(sorted(rounds, key=lambda record: int(record["round_num"])))
    return RunRecord(run_dir, flatten(read_yaml(config).values), ordered, content)


def load_environment(run_dir: Path) -> Mapping[str, Any]:
    """environment.json; empty where it is missing."""
    path = run_dir / "environment.json"
    return read_record(path, {}) if path.is_file() else {}


def load_split_sizes(run_dir: Path) -> dict[str, tuple[int, int, int]]:
    """Client id -> its numbers of train, validation and test rows by partition.json; empty where that is missing.

    Raises:
        StorageError: the file is damaged.
    """
    path = run_dir / "partition.json"
    clients = read_record(path, {"clients": dict})["clients"] if path.is_file() else {}
    sizes = {}
    for client_id, rows in clients.items():
        train, validation, test = (lookup(rows, split) for split in _SPLITS)
        if not all(isinstance(each, list) for each in (train, validation, test)):
            raise StorageError(f"{path}: damaged or edited: client {client_id!r} lacks a list of rows of a split")
        sizes[client_id] = (len(train), len(validation), len(test))
    return sizes


def initial_clients(run: RunRecord, split: str) -> Mapping[str, Mapping[str, Any]]:
    """Client id -> metrics before round 1 on one of its splits; empty where the run recorded none.

    While the run goes on they are in its checkpoints, which keep them for summary.json.
    """
    found = lookup(run.summary, "initial", split, "clients")
    if found is None:
        states = sorted(run.path.glob("checkpoints/round-*/state.json"))
        try:
            content = read_record(states[-1], {}) if states else {}
        except StorageError:  # a checkpoint that is replaced while it is read
            content = {}
        found = lookup(content, "progress", "initial", split, "clients")
    return found if isinstance(found, Mapping) else {}


def has_finished_rounds(directory: Path) -> bool:
    """Whether a run has a finished round, or a comparison a finished cell: whether there is something to draw."""
    if (directory / "results.jsonl").is_file():
        return True
    metrics = directory / "metrics.jsonl"
    return metrics.is_file() and bool(read_records(metrics, {"round_num": int}))


def unfinished_runs(folder: Path) -> list[Path]:
    """Run directories in a comparison's folder that have no summary: they go on, or they failed."""
    marks = sorted(folder.glob("*/config.yaml"))
    return [mark.parent for mark in marks if not (mark.parent / "summary.json").is_file()]


def load_cells(results: Path) -> list[CellRecord]:
    """Read results.jsonl; a run directory that was moved together with the file is found beside it.

    Raises:
        InputError: no such file.
        DataError: empty.
        StorageError: damaged, or a line without one of the four keys.
    """
    if not results.is_file():
        raise InputError(f"{results}: no such file; `sfedlora compare` writes it")
    cells = []
    for record in read_records(results, {"cell": str, "settings": dict, "run_dir": str, "summary": dict}):
        run_dir = _find_run(Path(record["run_dir"]), results.parent)
        cells.append(CellRecord(record["cell"], record["settings"], run_dir, record["summary"]))
    if not cells:
        raise DataError(f"{results}: empty; no cell has finished yet")
    return cells


def cell_of_run(run: RunRecord) -> CellRecord:
    """A run directory seen as a cell of a comparison."""
    return CellRecord(run.path.name, run.settings, run.path, run.summary)


def run_points(run: RunRecord, key: str) -> list[tuple[int, float]]:
    """(round, value) of one metric where it is a finite number; round 0 is the initial state, if it was evaluated."""
    points = [(int(record["round_num"]), number(record.get(key))) for record in run.rounds]
    initial = number(lookup(run.summary, "initial", "validation", "weighted", key))
    return [(round_num, value) for round_num, value in [(0, initial), *points] if value is not None]


def lookup(values: Any, *path: str) -> Any:
    """The value at a path of keys in nested mappings; None where it ends early."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def number(value: Any) -> float | None:
    """A finite number as a float, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _find_run(run_dir: Path, beside: Path) -> Path:
    candidates = [run_dir, beside / run_dir, beside / run_dir.name]
    return next((path for path in candidates if (path / "config.yaml").is_file()), run_dir)
