"""Runs the cells of a grid: finished ones skipped, begun ones continued, one results.jsonl.

Not here: which cells there are (`config.grid`).

A line of results.jsonl: `{"cell": name, "settings": {dotted key: value}, "run_dir": path, "summary": {...}}`. The
settings are `REPORTED_KEYS`, whatever else differs between the cells, gamma, and the preset if there is one. The
summary leaves out what it says of single clients; that stays in the run directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfedlora.artifacts import RunDirectory
from sfedlora.config import RunConfig
from sfedlora.config.flatten import flatten
from sfedlora.config.grid import Cell
from sfedlora.errors import ConfigError, DataError
from sfedlora.experiment import RunEvent, resume_events, run_events
from sfedlora.setup import load_source
from sfedlora.storage import to_json, write_text

__all__ = ["Cell", "CellStarted", "compare_events", "require_comparison_folder", "results_line"]

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
NOT_COMPARED = ("output", "preset")
"""A run may lie elsewhere now; what a preset sets is compared key by key."""
CHOSEN_BY_THE_RUN = ("partition.num_clients", "threads")
"""Keys whose null a run replaces by what it found."""


@dataclass(frozen=True)
class CellStarted:
    """A cell begins, goes on, or is skipped because it is finished."""

    index: int
    num_cells: int
    cell: Cell
    skipped: bool


def compare_events(cells: Sequence[Cell], output: Path) -> Iterator[CellStarted | RunEvent]:
    """Run all cells in order; after each, write results.jsonl with every cell of the grid that is finished.

    Raises:
        ConfigError: the output is itself a run, or a cell's folder holds a run with other settings, or something else.
        DataError: the data of a finished cell cannot be read or has changed. Nothing has run or been written then.
    """
    require_comparison_folder(output)
    for cell in cells:
        _require_usable_folder(cell)
    _require_same_data([cell for cell in cells if _is_finished(cell)])
    differing = _differing_keys(cells)
    for index, cell in enumerate(cells):
        path = Path(cell.config.output)
        yield CellStarted(index, len(cells), cell, _is_finished(cell))
        yield from resume_events(path) if _is_begun(cell) else run_events(cell.config)
        lines = [to_json(results_line(other, differing)) for other in cells if _is_finished(other)]
        write_text(output / "results.jsonl", "\n".join(lines) + "\n")


def require_comparison_folder(output: Path) -> None:
    """Refuse a folder that is itself a run, before anything is written beside that run's files.

    Raises:
        ConfigError: it holds a config.yaml, is no folder, or cannot be used.
    """
    try:
        holds_run = (output / "config.yaml").exists()
        is_other = output.exists() and not output.is_dir()
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be used ({error.strerror}); choose another") from None
    if holds_run:
        raise ConfigError(f"--output: {output} is a run of its own (config.yaml); choose a new folder for the cells")
    if is_other:
        raise ConfigError(f"--output: {output} is no folder; choose a new one for the cells")


def results_line(cell: Cell, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The line of results.jsonl of a finished cell, with the settings of further keys."""
    path = Path(cell.config.output)
    directory = RunDirectory.open(path)
    flat = flatten(directory.config().model_dump(mode="json"))
    settings = {key: flat.get(key) for key in dict.fromkeys([*REPORTED_KEYS, *keys])}
    settings["gamma"] = directory.environment()["scaling"]["gamma"]
    if flat["preset"] is not None:
        settings["preset"] = flat["preset"]
    summary = _without_clients(directory.summary())
    return {"cell": cell.name, "settings": settings, "run_dir": str(path), "summary": summary}


def _without_clients(summary: Any) -> Any:
    if not isinstance(summary, dict):
        return summary
    return {key: _without_clients(value) for key, value in summary.items() if key != "clients"}


def _differing_keys(cells: Sequence[Cell]) -> list[str]:
    """The keys in which the cells' configurations differ."""
    flat = [flatten(cell.config.model_dump(mode="json")) for cell in cells]
    return [key for key in flat[0] if key not in NOT_COMPARED and any(other[key] != flat[0][key] for other in flat)]


def _is_begun(cell: Cell) -> bool:
    return (Path(cell.config.output) / "config.yaml").is_file()


def _is_finished(cell: Cell) -> bool:
    return _is_begun(cell) and bool(RunDirectory.open(Path(cell.config.output)).summary())


def _require_usable_folder(cell: Cell) -> None:
    path = Path(cell.config.output)
    if _is_begun(cell):
        _require_same_settings(cell, RunDirectory.open(path).config())
    else:
        RunDirectory.check_free(path)


def _require_same_settings(cell: Cell, recorded: RunConfig) -> None:
    """The recorded configuration has the requested value wherever the run does not choose the value itself."""
    requested = flatten(cell.config.model_dump(mode="json"))
    found = flatten(recorded.model_dump(mode="json"))
    for key, value in requested.items():
        open_choice = value == "auto" or (value is None and key in CHOSEN_BY_THE_RUN)
        if key not in NOT_COMPARED and not open_choice and found.get(key) != value:
            raise ConfigError(
                f"{cell.config.output}: holds a run with {key} = {found.get(key)!r}, this comparison asks for "
                f"{value!r}; choose another --output"
            )


def _require_same_data(finished: Sequence[Cell]) -> None:
    """The data of finished cells still has the recorded digest; every source is read once."""
    digests: dict[tuple[str, str | None, str], str] = {}
    for cell in finished:
        directory, data = RunDirectory.open(Path(cell.config.output)), cell.config.data
        external = directory.environment()["external_sha256"]
        recorded = {
            "source": (data.source, directory.partition()["source_sha256"]),
            "validation": (data.validation, external.get("validation")),
            "test": (data.test, external.get("test")),
        }
        for key, (source, digest) in recorded.items():
            if source is None:
                continue
            address = (source, data.subset if source == data.source else None, data.hub_split)
            if address not in digests:
                digests[address] = load_source(cell.config, source).sha256
            if digests[address] != digest:
                raise DataError(
                    f"data.{key}: {source} has changed since {directory.path} was run; put the old file back or choose "
                    "another --output"
                )
