"""Read back what `run` and `compare` wrote: run directories and results.jsonl. Keys that are not known are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfedlora.config.yaml_file import read_yaml
from sfedlora.errors import DataError, InputError

__all__ = ["CellRecord", "RunRecord", "cell_of_run", "load_cells", "load_run", "run_points"]


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


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        InputError: it is no run directory, or no round has finished yet.
        DataError: one of its files is damaged.
    """
    config, metrics, summary = (run_dir / name for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    if not config.is_file():
        raise InputError(f"{run_dir}: no run directory (config.yaml is missing); give a folder that `run` wrote")
    rounds = _read_lines(metrics) if metrics.is_file() else []
    if not rounds:
        raise InputError(f"{run_dir}: no round has finished yet (metrics.jsonl is missing or empty)")
    for record in rounds:
        if not isinstance(record.get("round_num"), int):
            raise DataError(f"{metrics}: a line has no round_num; every line describes one round")
    content = _parse_object(summary.read_text(encoding="utf-8"), str(summary)) if summary.is_file() else {}
    ordered = tuple(sorted(rounds, key=lambda record: int(record["round_num"])))
    return RunRecord(run_dir, flatten(read_yaml(config).values), ordered, content)


def load_cells(results: Path) -> list[CellRecord]:
    """Read results.jsonl; a run directory that was moved together with the file is found beside it.

    Raises:
        InputError: no such file.
        DataError: empty, damaged, or a line without one of the four keys.
    """
    if not results.is_file():
        raise InputError(f"{results}: no such file; `sfedlora compare` writes it")
    cells = []
    for number, record in enumerate(_read_lines(results), start=1):
        missing = [key for key in ("cell", "settings", "run_dir", "summary") if key not in record]
        if missing or not isinstance(record["settings"], Mapping) or not isinstance(record["summary"], Mapping):
            what = f"lacks {', '.join(missing)}" if missing else "has settings or a summary that is no object"
            raise DataError(f"{results}: line {number} {what}; expected cell, settings, run_dir, summary")
        run_dir = _find_run(Path(record["run_dir"]), results.parent)
        cells.append(CellRecord(str(record["cell"]), record["settings"], run_dir, record["summary"]))
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _find_run(run_dir: Path, beside: Path) -> Path:
    candidates = [run_dir, beside / run_dir, beside / run_dir.name]
    return next((path for path in candidates if (path / "config.yaml").is_file()), run_dir)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line without an end (still being written) is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    return [_parse_object(line, f"{path}, line {at}") for at, line in enumerate(lines[:-1], start=1) if line.strip()]


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(content).__name__}")
    return content
