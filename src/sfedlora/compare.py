"""A grid of runs over configuration keys: one cell per combination, finished cells skipped, one results.jsonl.

A line of results.jsonl: `{"cell": name, "settings": {dotted key: value}, "run_dir": path, "summary": {...}}`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfedlora.artifacts import RunDirectory
from sfedlora.config import PRESETS, RunConfig, apply_overrides
from sfedlora.config.yaml_file import read_yaml
from sfedlora.data.partition import safe_directory_name
from sfedlora.errors import ConfigError
from sfedlora.experiment import RunEvent, RunResult, resume_events, run_events
from sfedlora.storage import to_json, write_text

__all__ = ["Axis", "Cell", "CellStarted", "compare_events", "make_cells", "method_axis", "results_line"]

REPORTED_KEYS = (
    "method.name",
    "lora.scaling",
    "lora.init",
    "lora.rank",
    "lora.alpha",
    "partition.num_clients",
    "rounds.num_rounds",
    "local.optimizer",
    "local.learning_rate",
    "seed",
)


@dataclass(frozen=True)
class Axis:
    """One varied setting.

    Attributes:
        name: how the setting is called in cell names.
        choices: value as shown -> overrides (`key=value`) that set it.
    """

    name: str
    choices: Mapping[str, tuple[str, ...]]

    @classmethod
    def of_key(cls, key: str, values: Sequence[str]) -> Axis:
        """An axis over the values of one configuration key."""
        if not values or not all(value.strip() for value in values):
            raise ConfigError(f"--vary {key}: expected key=value,value,..., got an empty value")
        return cls(key.rsplit(".", 1)[-1], {value: (f"{key}={value}",) for value in values})


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class CellStarted:
    """A cell begins, goes on, or is skipped because it is finished."""

    index: int
    num_cells: int
    cell: Cell
    skipped: bool


def method_axis(names: Sequence[str]) -> Axis:
    """An axis over presets and method names."""
    choices = {name: (f"preset={name}",) if name in PRESETS else (f"method.name={name}",) for name in names}
    return Axis("method", choices)


def make_cells(config_path: Path, overrides: Sequence[str], axes: Sequence[Axis], output: Path) -> list[Cell]:
    """All combinations of the axes' values, each as a checked configuration with its own run directory.

    Raises:
        ConfigError: a combination that is no valid configuration, or two axes of one name.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) != len(names):
        raise ConfigError(f"--vary: two axes are called the same ({', '.join(names)}); vary each key once")
    document = read_yaml(config_path)
    cells = []
    for combination in itertools.product(*(axis.choices.items() for axis in axes)):
        name = ",".join(f"{axis}={value}" for axis, (value, _) in zip(names, combination, strict=True)) or "run"
        settings = [override for _, own in combination for override in own]
        folder = output / safe_directory_name(name)
        values = apply_overrides(document.values, [*overrides, *settings]) | {"output": str(folder)}
        cells.append(Cell(name, RunConfig.from_mapping(values, origin=document, name=str(config_path))))
    return cells


def compare_events(cells: Sequence[Cell], output: Path) -> Iterator[CellStarted | RunEvent]:
    """Run all cells in order; write results.jsonl after each.

    Raises:
        ConfigError: a cell's folder holds a run with other settings.
    """
    lines: list[str] = []
    for index, cell in enumerate(cells):
        path = Path(cell.config.output)
        begun = (path / "config.yaml").is_file()
        if begun:
            _require_same_settings(cell, RunDirectory.open(path).config())
        finished = begun and bool(RunDirectory.open(path).summary())
        yield CellStarted(index, len(cells), cell, finished)
        for event in resume_events(path) if begun else run_events(cell.config):
            yield event
            if isinstance(event, RunResult):
                lines.append(to_json(results_line(cell, event)))
                write_text(output / "results.jsonl", "\n".join(lines) + "\n")


def results_line(cell: Cell, result: RunResult) -> dict[str, Any]:
    """One line of results.jsonl."""
    directory = RunDirectory.open(result.run_dir)
    flat = _flatten(directory.config().model_dump(mode="json"))
    scaling = directory.environment()["scaling"]
    settings = {key: flat[key] for key in REPORTED_KEYS} | {"gamma": scaling["gamma"]}
    if flat["preset"] is not None:
        settings["preset"] = flat["preset"]
    return {"cell": cell.name, "settings": settings, "run_dir": str(result.run_dir), "summary": result.summary}


def _require_same_settings(cell: Cell, recorded: RunConfig) -> None:
    """The recorded configuration has the requested value wherever the request is not left open."""
    requested = _flatten(cell.config.model_dump(mode="json"))
    found = _flatten(recorded.model_dump(mode="json"))
    for key, value in requested.items():
        if key != "output" and value not in ("auto", None) and found.get(key) != value:
            raise ConfigError(
                f"{cell.config.output}: holds a run with {key} = {found.get(key)!r}, this comparison asks for {value!r}; "
                "choose another output"
            )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key != "columns":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
