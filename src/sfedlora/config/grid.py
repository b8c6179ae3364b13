"""A grid of configurations: varied settings and all their combinations, each checked before anything runs.

Not here: running the cells (`compare`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfedlora.config.presets import PRESETS
from sfedlora.config.run_config import RunConfig, with_overrides
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
    """

    name: str
    choices: Mapping[str, tuple[str, ...]]

    @classmethod
    def of_key(cls, key: str, values: Sequence[str]) -> Axis:
        """An axis over the values of one configuration key.

        Raises:
            ConfigError: an empty value, or the key `output`, which every cell has its own of.
        """
        if not values or not all(value.strip() for value in values):
            raise ConfigError(f"--vary {key}: expected key=value,value,..., got an empty value")
        if key == "output":
            raise ConfigError("--vary output: every cell gets a folder of its own; choose their parent with --output")
        return cls(key, {value: (f"{key}={value}",) for value in values})


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    config: RunConfig


def method_axis(names: Sequence[str]) -> Axis:
    """An axis over presets and method names; a preset brings its method, scaling and initialisation.

    Raises:
        ConfigError: an empty name.
    """
    if not all(names):
        raise ConfigError(f"--methods: expected names separated by commas, got {','.join(names)!r}")
    choices = {name: _preset_overrides(name) if name in PRESETS else (f"method.name={name}",) for name in names}
    return Axis("method", choices)


def make_cells(config_path: Path, overrides: Sequence[str], axes: Sequence[Axis], output: Path) -> list[Cell]:
    """All combinations of the axes' values, each as a checked configuration with its own run directory.

    What is varied wins over `overrides`, and both win over the file; so a preset of `method_axis` also wins over the
    method, scaling and initialisation that the file names.

    Raises:
        ConfigError: a combination that is no valid configuration, a key varied twice, or an override of `output`.
    """
    if any(override.partition("=")[0].strip() == "output" for override in overrides):
        raise ConfigError("output=...: every cell gets a folder of its own; choose their parent with --output")
    names = _axis_names(axes)
    document = read_yaml(config_path)
    cells = []
    for combination in itertools.product(*(axis.choices.items() for axis in axes)):
        name = ",".join(f"{axis}={value}" for axis, (value, _) in zip(names, combination, strict=True)) or "run"
        settings = [override for _, own in combination for override in own]
        folder = output / safe_directory_name(name)
        origin = with_overrides(document, [*overrides, *settings])
        values = {**origin.values, "output": str(folder)}
        try:
            cells.append(Cell(name, RunConfig.from_mapping(values, origin=origin, name=str(config_path))))
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None
    return cells


def _preset_overrides(name: str) -> tuple[str, ...]:
    """The preset and, spelled out, what it sets, because a key in the file would win over the preset alone."""
    settings = (f"{section}.{key}={value}" for section, keys in PRESETS[name].items() for key, value in keys.items())
    return (f"preset={name}", *settings)


def _axis_names(axes: Sequence[Axis]) -> list[str]:
    """Last parts of the keys, whole keys where two last parts are the same."""
    keys = [axis.name for axis in axes]
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--vary: a key is varied twice ({', '.join(keys)}); give each key once")
    short = [key.rsplit(".", 1)[-1] for key in keys]
    return [key if short.count(last) > 1 else last for key, last in zip(keys, short, strict=True)]
