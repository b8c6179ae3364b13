"""Tensors of clients on disk: an immutable file per client and round in which it changed.

    <folder>/000003/<dir>.safetensors     client <dir> as it was after round 3

The header of a file holds a digest of its tensors, and whoever refers to the file knows that digest. So a file that is
missing, cut off or of another run, client or round is found by a look at its header, and one whose content is damaged
when it is read. Files and folders are open to their owner alone.

Not here: which files a checkpoint refers to and when they are removed (`checkpoints`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import StorageError
from sfedlora.storage import add_file, directory_written_whole, make_directory, require_header, to_safetensors
from sfedlora.types import Tensors

__all__ = ["ClientFile", "ClientFiles", "check_files", "path_of", "verify_files", "with_written"]

STAMP = "sha256"
DIGEST_LENGTH = 32


class ClientFile(NamedTuple):
    """Reference to one file: the round that wrote it, and the digest of its tensors; "" and no file if it has none."""

    round_num: int
    digest: str


@dataclass(frozen=True, eq=False)
class ClientFiles(Mapping[str, Tensors]):
    """Client id -> its tensors, memory-mapped from its file and verified at every access; nothing is kept.

    Attributes:
        folder: where the files are.
        index: client id -> its file.
    """

    folder: Path
    index: Mapping[str, ClientFile] = field(default_factory=dict)

    def __getitem__(self, client_id: str) -> Tensors:
        """Read a client's tensors.

        Raises:
            StorageError: its file is missing, damaged or not the one that is referred to.
        """
        file = self.index[client_id]
        return _read(path_of(self, client_id), file.digest) if file.digest else {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.index


def path_of(files: ClientFiles, client_id: str) -> Path:
    """Where a client's present file is."""
    return files.folder / f"{files.index[client_id].round_num:06d}" / f"{safe_directory_name(client_id)}.safetensors"


def with_written(files: ClientFiles, round_num: int, changed: Mapping[str, Tensors]) -> ClientFiles:
    """Write the clients that a round changed, all or none; the mapping with their new files.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    digests = {client_id: _digest(changed[client_id]) if changed[client_id] else "" for client_id in sorted(changed)}
    written = {client_id: ClientFile(round_num, digest) for client_id, digest in digests.items()}
    after = replace(files, index={**files.index, **written})
    if any(digests.values()):
        make_directory(files.folder, private=True)
        with directory_written_whole(files.folder / f"{round_num:06d}", private=True) as folder:
            for client_id, digest in digests.items():
                if digest:
                    content = to_safetensors(changed[client_id], metadata={STAMP: digest})
                    add_file(folder / path_of(after, client_id).name, content, private=True)
    return after


def check_files(files: ClientFiles) -> None:
    """Look at the header of every file, without reading its tensors.

    Raises:
        StorageError: a file is missing, cut off or of another run, client or round; the message names it.
    """
    for client_id, file in files.index.items():
        if file.digest:
            _opened(path_of(files, client_id), file.digest)


def verify_files(files: ClientFiles, verified: set[Path]) -> None:
    """Read every file once and compare its content with its digest.

    Args:
        files: the clients.
        verified: files that need not be read again; those that are read are added.

    Raises:
        StorageError: as `check_files`, or a file's content is not what was written.
    """
    for client_id, file in files.index.items():
        path = path_of(files, client_id)
        if file.digest and path not in verified:
            _read(path, file.digest)
            verified.add(path)


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    file = _opened(path, digest)
    try:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping, has keys()
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise StorageError(f"{path}: damaged safetensors file ({error}); put the original file back") from None
    if _digest(tensors) != digest:
        raise StorageError(f"{path}: damaged: its content is not what was written; put the original file back")
    return tensors


def _opened(path: Path, digest: str) -> Any:
    """The memory-mapped `safe_open` file (which has no types), its length and its stamp checked."""
    require_header(path)
    try:
        file: Any = safetensors.safe_open(path, framework="pt")
        stamp = (file.metadata() or {}).get(STAMP)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror or 'no such file'}); put the original file back"
        ) from None
    except safetensors.SafetensorError as error:
        raise StorageError(f"{path}: damaged safetensors file ({error}); put the original file back") from None
    if stamp != digest:
        raise StorageError(
            f"{path}: not the file that the checkpoint refers to, but one of another run, client or round; put the "
            "original file back"
        )
    return file


def _digest(tensors: Tensors) -> str:
    """Digest of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGEST_LENGTH]
