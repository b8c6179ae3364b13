"""YAML 1.2 in and out, with the line of every key.

PyYAML reads YAML 1.1, where `1e-3` is a string and `no` is false. The loader here resolves scalars by the YAML 1.2
core schema and refuses duplicate keys. Only plain data comes out: no tag can build an object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sfedlora.errors import ConfigError

__all__ = ["Document", "dump_yaml", "parse_scalar", "read_yaml", "split_values"]

MAX_BYTES = 1 << 20
MAX_NODES = 100_000

_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
)


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own slot


class _CoreDumper(yaml.SafeDumper):
    """SafeDumper that quotes what the core schema would misread."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _class in (_CoreLoader, _CoreDumper):
    for _tag, _pattern, _first in _CORE_SCHEMA:
        _class.add_implicit_resolver(_tag, _pattern, _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Decimal only: 010 is ten, as in YAML 1.2."""
    return int(loader.construct_scalar(node))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line separators that PyYAML would fold to a space are written as escapes."""
    style = '"' if any(character in text for character in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CoreDumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Document:
    """A parsed mapping and the line (from 1) on which each dotted key stands."""

    values: Mapping[str, Any]
    lines: Mapping[str, int]


def read_yaml(path: Path) -> Document:
    """Read a configuration file.

    Raises:
        ConfigError: not there, not UTF-8, not YAML, a duplicate key, or not a mapping; with the line.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes is no configuration file; expected at most {MAX_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    return _parse(text, str(path))


def parse_scalar(text: str) -> Any:
    """Parse the value of a `key=value` override exactly as the file would be."""
    try:
        return yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise ConfigError(f"{shown!r} is not a YAML value; quote it if it is meant as text") from None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write plain data as YAML that `read_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=100)


def _parse(text: str, name: str) -> Document:
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{name}: the file is empty; expected a mapping with model, data and partition")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}, line 1: expected a mapping of sections, such as `model:`")
        lines: dict[str, int] = {}
        _collect_lines(node, "", lines, name, [0])
        return Document(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {type(error).__name__}") from None


def _collect_lines(node: yaml.Node, prefix: str, lines: dict[str, int], name: str, count: list[int]) -> None:
    """Record the line of every key; refuse duplicates and documents blown up by aliases."""
    count[0] += 1
    if count[0] > MAX_NODES:
        raise ConfigError(f"{name}: more than {MAX_NODES} values (aliases count each time); expected a plain file")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, f"{prefix}[{index}]", lines, name, count)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
        line = key.start_mark.line + 1
        if dotted in lines:
            raise ConfigError(f"{name}, line {line}: {dotted} was already given on line {lines[dotted]}")
        lines[dotted] = line
        _collect_lines(value, dotted, lines, name, count)


def split_values(text: str) -> list[str]:
    """Split `v1,v2` at commas outside brackets and quotes: `[a,b],[c]` gives two values."""
    values, depth, quote, current = [], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quote:
            values.append(current.strip())
            current = ""
        else:
            current += character
    return [*values, current.strip()]
