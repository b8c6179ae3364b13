"""JSON and safetensors in and out; what is read is checked, and an error names the file.

Nothing executes and nothing large is allocated from a claim: a header must fit its file before any tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sfedlora.errors import StorageError
from sfedlora.types import Tensors

__all__ = [
    "MAX_HEADER_BYTES",
    "read_json",
    "read_record",
    "read_records",
    "read_tensors",
    "require_header",
    "to_json",
    "to_safetensors",
]

MAX_HEADER_BYTES = 1 << 25
"""Largest header of a safetensors file that is parsed: room for 200,000 tensors and more."""
_LENGTH_BYTES = 8


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error})") from None


def read_record(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object that must hold certain values.

    Args:
        path: the file.
        kinds: dotted key -> type or union of types of its value; `object` where any value will do.

    Raises:
        StorageError: it is missing, not JSON, no object, or a value is missing or of another type.
    """
    return _checked(read_json(path), kinds, str(path))


def read_records(path: Path, kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read a JSON Lines file of objects as `read_record`; a torn last line (no line end yet) is left out.

    Raises:
        StorageError: as `read_record`; the message names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            content = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{where}: not valid JSON ({error})") from None
        records.append(_checked(content, kinds, where))
    return records


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        StorageError: it is missing, truncated or not safetensors.
    """
    require_header(path)
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or 'no such file'})") from None
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise StorageError(f"{path}: damaged safetensors file ({error})") from None


def require_header(path: Path) -> None:
    """Refuse a safetensors file whose header cannot be that long, before anything reads it.

    Raises:
        StorageError: it is missing, shorter than its header, or the header is beyond `MAX_HEADER_BYTES`.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        rest = path.stat().st_size - _LENGTH_BYTES
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    if not 1 < length <= min(rest, MAX_HEADER_BYTES):
        raise StorageError(
            f"{path}: damaged safetensors file (a header of {length} bytes, expected at most "
            f"{max(0, min(rest, MAX_HEADER_BYTES))})"
        )


def to_safetensors(tensors: Tensors, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Content of a safetensors file. The order of several metadata entries is not defined."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata=None if metadata is None else dict(metadata))


def to_json(values: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, mappings and tuples become plain ones."""
    return json.dumps(_plain(values), indent=indent, ensure_ascii=False, allow_nan=False)


def _checked(content: Any, kinds: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise StorageError(f"{where}: damaged or edited: expected a JSON object, found {type(content).__name__}")
    for dotted, kind in kinds.items():
        value: Any = content
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                raise StorageError(f"{where}: damaged or edited: {dotted} is missing; put the original file back")
            value = value[key]
        if not isinstance(value, kind):
            raise StorageError(
                f"{where}: damaged or edited: {dotted} is {type(value).__name__}; put the original file back"
            )
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
