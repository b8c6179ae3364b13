"""A commented first configuration: what was chosen is set, every other key has its place, default and meaning."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfedlora.config.run_config import RunConfig
from sfedlora.config.yaml_file import dump_yaml

__all__ = ["starter_yaml"]

WIDTH = 100


def starter_yaml(chosen: Mapping[str, Any]) -> str:
    """YAML text that `RunConfig.load` reads.

    Args:
        chosen: dotted key -> value of the keys that are set; those without a default must be among them. All others
            are commented out with their default.

    Raises:
        ConfigError: the chosen values are no valid configuration.
    """
    RunConfig.from_mapping(_nested(chosen))
    parts = [
        "## A federation for `sfedlora run`. A line that begins with one # holds a key with its default: take the #",
        "## away to change it. `key=value` on the command line wins over this file, for example lora.rank=128.",
    ]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        parts.append("")
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts += _section(name, section, chosen)
        else:
            parts += _key(name, name, field, chosen, "")
    return "\n".join(parts) + "\n"


def _section(name: str, section: type[BaseModel], chosen: Mapping[str, Any]) -> list[str]:
    fields = section.model_fields
    first = next(iter(fields))
    if not any(key.startswith(f"{name}.") for key in chosen):  # a section with comments alone would be null
        chosen = {f"{name}.{first}": fields[first].get_default(call_default_factory=True)}
    lines = [line for key, field in fields.items() for line in _key(f"{name}.{key}", key, field, chosen, "  ")]
    return [f"## {' '.join((section.__doc__ or '').split())}", f"{name}:", *lines]


def _key(dotted: str, key: str, field: FieldInfo, chosen: Mapping[str, Any], indent: str) -> list[str]:
    meaning = " ".join((field.description or "").split())
    lines = textwrap.wrap(meaning, WIDTH, initial_indent=f"{indent}## ", subsequent_indent=f"{indent}## ")
    if dotted in chosen:
        return [*lines, f"{indent}{_value(key, chosen[dotted])}"]
    return [*lines, f"{indent}# {_value(key, field.get_default(call_default_factory=True))}"]


def _value(key: str, value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return f"{key}: {json.dumps(value, ensure_ascii=False)}"
    return dump_yaml({key: value}).strip()


def _nested(chosen: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for dotted, value in chosen.items():
        section, _, key = dotted.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values
