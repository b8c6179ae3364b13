"""A grid of configurations: varied settings and all their combinations, each checked before anything runs.

Not here: running the cells (`compare`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfedlora.config.flatten import flatten
from sfedlora.config.presets import PRESETS
from sfedlora.config.run_config import RunConfig, apply_overrides, with_overrides
from sfedlora.config.yaml_file import read_yaml
from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import ConfigError

__all__ = ["Axis", "Cell", "make_cells", "method_axis"]


@dataclass(frozen=True)
class Axis:
    """One varied setting.

    Attributes:
        name: the configuration key, or what several keys that vary together are called.
        choices: value as shown -> overrides (`key=value`) that set it.
        brings_keys: whether the choices are presets, which bring keys that another axis may vary as well.
    """

    name: str
    choices: Mapping[str, tuple[str, ...]]
    brings_keys: bool = False

    @classmethod
    def of_key(cls, key: str, values: Sequence[str]) -> Axis:
        """An axis over the values of one configuration key; the key `preset` varies all that its presets set.

        Raises:
            ConfigError: an empty value, or the key `output`, which every cell has its own of.
        """
        if not values or not all(value.strip() for value in values):
            raise ConfigError(f"--vary {key}: expected key=value,value,..., got an empty value")
        if key == "output":
            raise ConfigError("--vary output: every cell gets a folder of its own; choose their parent with --output")
        if key == "preset":
            return cls(key, {name: _preset_overrides(name) for name in values}, brings_keys=True)
        return cls(key, {value: (f"{key}={value}",) for value in values})


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        name: what tells it from the others, for messages and folders.
        config: its configuration.
        choices: what was chosen on each axis, both as shown.
    """

    name: str
    config: RunConfig
    choices: Mapping[str, str] = field(default_factory=dict)


def method_axis(names: Sequence[str]) -> Axis:
    """An axis over presets and method names; a preset brings its method, scaling and initialisation.

    Raises:
        ConfigError: an empty name.
    """
    if not all(names):
        raise ConfigError(f"--methods: expected names separated by commas, got {','.join(names)!r}")
    choices = {name: _preset_overrides(name) if name in PRESETS else (f"method.name={name}",) for name in names}
    return Axis("method", choices, brings_keys=True)


def make_cells(config_path: Path, overrides: Sequence[str], axes: Sequence[Axis], output: Path) -> list[Cell]:
    """All combinations of the axes' values, each as a checked configuration with its own run directory.

    A varied key wins over `overrides`, and both win over the file. What a preset brings wins over the file, but not
    over a key that is varied beside it.

    Raises:
        ConfigError: a combination that is no valid configuration, a key varied twice, an override of `output` or of a
            key that the presets bring, or two combinations that are the same run.
    """
    given = flatten(apply_overrides({}, overrides))
    if "output" in given:
        raise ConfigError("output=...: every cell gets a folder of its own; choose their parent with --output")
    _refuse_ignored(given, axes)
    names = _axis_names(axes)
    document = read_yaml(config_path)
    cells = []
    for combination in itertools.product(*(axis.choices.items() for axis in axes)):
        choices = {name: value for name, (value, _) in zip(names, combination, strict=True)}
        name = ",".join(f"{axis}={value}" for axis, value in choices.items()) or "run"
        chosen = sorted(zip(axes, combination, strict=True), key=lambda pair: not pair[0].brings_keys)
        settings = [override for _, (_, own) in chosen for override in own]
        origin = with_overrides(document, [*overrides, *settings])
        values = {**origin.values, "output": str(output / safe_directory_name(name))}
        try:
            config = RunConfig.from_mapping(values, origin=origin, name=str(config_path))
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None
        cells.append(Cell(name, config, choices))
    _refuse_twins(cells)
    return cells


def _preset_overrides(name: str) -> tuple[str, ...]:
    """The preset and, spelled out, what it sets, because a key in the file would win over the preset alone."""
    preset = PRESETS.get(name, {})  # an unknown one is refused with its cell
    settings = (f"{section}.{key}={value}" for section, keys in preset.items() for key, value in keys.items())
    return (f"preset={name}", *settings)


def _refuse_ignored(given: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    """Refuse overrides of what presets bring: the presets would win, and the override would do nothing."""
    brought = {
        override.partition("=")[0]: preset
        for axis in axes
        if axis.brings_keys
        for preset, overrides in axis.choices.items()
        for override in overrides[1:]
    }
    for key, value in given.items():
        if key in brought:
            raise ConfigError(
                f"{key}={value}: preset {brought[key]} sets it in its own cells; leave it out, or write "
                f"--vary {key}={value} to have it in all of them"
            )


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        content = cell.config.model_dump_json(exclude={"output", "preset"})
        if content in seen:
            raise ConfigError(f"cells {seen[content]} and {cell.name} are the same run; leave one of them out")
        seen[content] = cell.name


def _axis_names(axes: Sequence[Axis]) -> list[str]:
    """Last parts of the keys, whole keys where two last parts are the same."""
    keys = [axis.name for axis in axes]
    if sum(axis.brings_keys for axis in axes) > 1:
        raise ConfigError("presets are varied twice; name all of them in --methods or all in --vary preset=...")
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--vary: a key is varied twice ({', '.join(keys)}); give each key once")
    short = [key.rsplit(".", 1)[-1] for key in keys]
    return [key if short.count(last) > 1 else last for key, last in zip(keys, short, strict=True)]
