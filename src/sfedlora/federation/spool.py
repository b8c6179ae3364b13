"""Tensors of many clients on disk for as long as a process needs them: the updates of a large cohort.

Updates arrive in any order and enter the aggregate in client-id order, so all of them must wait somewhere. In a spool
they wait in one safetensors file each, and a tensor is read when it is asked for: memory holds the one at hand.

Not here: what is kept between processes (`artifacts`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import StorageError
from sfedlora.types import Part, Tensors, part_of, select_parts

__all__ = ["Spool", "SpooledTensors", "num_bytes", "select_lazily"]

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""


class Spool:
    """Owner of a temporary folder of tensors; a context manager.

        with Spool(run_dir) as spool:
            tensors = spool.put("client 7", update)      # bit for bit, any dtype; CPU tensors

    A file lives until its key is removed or put again, the spool is closed, or nobody refers to what `put` returned.
    The folder is made by the first `put`.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Take the folder to make the temporary one in; None is the system's, which may lie in memory."""
        self._parent = parent
        self._folder: Path | None = None
        self._close: Callable[[], object] = lambda: None
        self._layouts: dict[tuple[bytes, tuple[str, ...]], _Layout] = {}
        self._files: weakref.WeakValueDictionary[str, _File] = weakref.WeakValueDictionary()
        self._count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def put(self, key: str, tensors: Tensors) -> SpooledTensors:
        """Write tensors, in place of what the key had before; they keep their order.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        self.remove(key)
        self._count += 1
        path = self._made_folder() / f"{self._count:06d}-{safe_directory_name(key)}.safetensors"
        dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(dense, path)  # straight from the tensors' memory, without a copy of the content
            with path.open("rb") as stored:
                length = stored.read(LENGTH_BYTES)
                header = length + stored.read(int.from_bytes(length, "little"))
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise StorageError(f"{path}: cannot be written ({error}); free space or permissions?") from None
        layout = self._layouts.setdefault((header, tuple(tensors)), _layout_of(header, tensors))
        checksums = array("I", (zlib.crc32(_block(tensor)) for tensor in dense.values()))
        file = _File(path, layout, checksums)
        weakref.finalize(file, _unlink, path)
        self._files[key] = file
        return SpooledTensors(file, tuple(layout.places))

    def remove(self, key: str) -> None:
        """Remove what a key has, if it has anything."""
        file = self._files.pop(key, None)
        if file is not None:
            _unlink(file.path)

    def close(self) -> None:
        """Remove everything; what was put can no longer be read."""
        self._close()

    def _made_folder(self) -> Path:
        if self._folder is None:
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=".spool-", suffix=".tmp", dir=self._parent))
            except OSError as error:
                raise StorageError(
                    f"{self._parent}: no temporary folder can be made ({error.strerror}); free space or permissions?"
                ) from None
            self._close = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its number among all, its first byte in the file, the one after its last."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Layout:
    """What files of like tensors have in common.

    Attributes:
        header: the first bytes of the file.
        places: name -> place, in the order given.
    """

    header: bytes
    places: Mapping[str, _Place]


@dataclass(frozen=True, eq=False)
class _File:
    """One file, removed with the last reference to this object; a CRC-32 for each place of its layout."""

    path: Path
    layout: _Layout
    checksums: array[int]


@dataclass(frozen=True, eq=False)
class SpooledTensors(Mapping[str, Tensor]):
    """Some tensors of a file in a spool; each access reads one, nothing is kept and no file stays open.

    Attributes:
        file: where they are.
        names: which of its tensors these are, in order.
    """

    file: _File
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            StorageError: the file is missing or damaged.
        """
        if name not in self.names:
            raise KeyError(name)
        return _read(self.file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def select_lazily(tensors: Tensors, parts: Iterable[Part]) -> Tensors:
    """`select_parts` that reads nothing from a spool."""
    if not isinstance(tensors, SpooledTensors):
        return select_parts(tensors, parts)
    wanted = frozenset(parts)
    return SpooledTensors(tensors.file, tuple(name for name in tensors.names if part_of(name) in wanted))


def num_bytes(tensors: Tensors) -> int:
    """Bytes of tensors as they are sent; nothing is read from a spool."""
    if isinstance(tensors, SpooledTensors):
        places = tensors.file.layout.places
        return sum(places[name].stop - places[name].start for name in tensors.names)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _layout_of(header: bytes, tensors: Tensors) -> _Layout:
    entries: dict[str, Any] = json.loads(header[LENGTH_BYTES:])
    places = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        start, stop = (len(header) + offset for offset in entries[name]["data_offsets"])
        places[name] = _Place(number, tensor.dtype, tuple(tensor.shape), start, stop)
    return _Layout(header, places)


def _read(file: _File, name: str) -> Tensor:
    layout = file.layout
    place = layout.places[name]
    tensor = torch.empty(place.shape, dtype=place.dtype)
    block = _block(tensor)
    try:
        with file.path.open("rb") as stored:
            header = stored.read(len(layout.header))
            stored.seek(place.start)
            num_read = stored.readinto(block) if len(block) else 0
    except OSError as error:
        raise StorageError(f"{file.path}: cannot be read ({error.strerror}); it was there for this run only") from None
    if (header, num_read, zlib.crc32(block)) != (layout.header, len(block), file.checksums[place.number]):
        raise StorageError(f"{file.path}: damaged: {name} is not what was written; something else wrote into it")
    return tensor


def _block(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
