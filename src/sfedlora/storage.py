"""Files that are either whole or not there: temp file, fsync, rename, directory fsync."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sfedlora.errors import StorageError
from sfedlora.types import Tensors

__all__ = [
    "add_file",
    "append_line",
    "directory_written_whole",
    "make_directory",
    "read_json",
    "read_record",
    "read_records",
    "read_tensors",
    "remove_directory",
    "sync_files",
    "to_json",
    "to_safetensors",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new content.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or permissions?") from None


def add_file(path: Path, content: bytes) -> None:
    """Write a file into the folder of a `directory_written_whole`, which makes it appear with all others.

    Raises:
        OSError: the disk refuses; `directory_written_whole` makes it a StorageError.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_directory(path: Path) -> None:
    """Make a folder and those above it that lack, so that their names too survive a power loss.

    Raises:
        StorageError: it cannot be made.
    """
    lacking = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in lacking:
            _sync_directory(folder.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be made ({error.strerror}); free space or permissions?") from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """`write_bytes` for indented JSON; NaN and infinities become null."""
    write_text(path, to_json(values, indent=2) + "\n")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """`write_bytes` for a safetensors file."""
    write_bytes(path, to_safetensors(tensors))


def append_line(path: Path, text: str) -> None:
    """Append one line and sync it; of a new file its name too.

    Raises:
        StorageError: as `write_bytes`.
    """
    is_new = not path.exists()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or permissions?") from None


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
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or 'no such file'})") from None
    except safetensors.SafetensorError as error:
        raise StorageError(f"{path}: damaged safetensors file ({error})") from None


def to_safetensors(tensors: Tensors, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Content of a safetensors file. The order of several metadata entries is not defined."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata=None if metadata is None else dict(metadata))


def to_json(values: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null, mappings and tuples become plain ones."""
    return json.dumps(_plain(values), indent=indent, ensure_ascii=False, allow_nan=False)


@contextmanager
def directory_written_whole(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that takes its final name only when the block ends without an error.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _sync_directory(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or permissions?") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Remove a folder so that it never is half there; what cannot be removed stays under a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with suppress(OSError):
        path.rename(temporary)
        shutil.rmtree(temporary)


def sync_files(folder: Path) -> None:
    """Bring files that a library has written into a folder to the disk.

    Raises:
        OSError: the disk refuses; `directory_written_whole` makes it a StorageError.
    """
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


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


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
