"""Files and folders that are either whole or not there: temporary name, sync, rename, sync of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sfedlora.errors import StorageError
from sfedlora.storage import disk
from sfedlora.storage.content import to_json, to_safetensors
from sfedlora.types import Tensors

__all__ = [
    "add_file",
    "append_line",
    "directory_written_whole",
    "make_directory",
    "remove_directory",
    "remove_file",
    "remove_leftovers",
    "sync_files",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
]


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file so that a crash leaves either the old or the new content.

    Args:
        path: the file; a link of that name is replaced, not followed.
        content: all of it.
        private: readable and writable by its owner alone, whatever the umask.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old file is intact.
    """
    temporary = _temporary(path)
    try:
        if temporary.exists() or temporary.is_symlink():
            disk.remove(temporary)
        disk.create(temporary, content, private=private)
        disk.rename(temporary, path)
        disk.sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _refused(path, error) from None


def add_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file into the folder of a `directory_written_whole`, which makes it appear with all others.

    Raises:
        OSError: the disk refuses; `directory_written_whole` makes it a StorageError.
    """
    disk.create(path, content, private=private)


def make_directory(path: Path, *, private: bool = False) -> None:
    """Make a folder and those above it that lack, so that their names too survive a power loss.

    Args:
        path: the folder.
        private: this folder, also if it exists, is open to its owner alone; not those above it.

    Raises:
        StorageError: it cannot be made.
    """
    lacking = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    try:
        for folder in reversed(lacking):
            disk.make_folder(folder, private=private and folder == path)
            disk.sync(folder.parent)
        if private and not lacking:
            path.chmod(disk.PRIVATE_FOLDER)
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
        disk.append(path, f"{text}\n".encode())
        if is_new:
            disk.sync(path.parent)
    except OSError as error:
        raise _refused(path, error) from None


@contextmanager
def directory_written_whole(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Fill a temporary folder that takes its final name only when the block ends without an error.

    Args:
        path: the folder; one of that name is replaced, and never half there meanwhile.
        private: open to its owner alone, whatever the umask.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary, before = _temporary(path), _temporary(path.with_name(f"{path.name}.before"))
    try:
        disk.remove_tree(temporary)
        make_directory(path.parent)
        disk.make_folder(temporary, private=private)
        yield temporary
        disk.sync(temporary)
        is_replaced = path.exists() or path.is_symlink()
        if is_replaced:
            disk.remove_tree(before)
            disk.rename(path, before)
        disk.rename(temporary, path)
        disk.sync(path.parent)
        if is_replaced:
            disk.remove_tree(before)
    except OSError as error:
        if before.exists() and not path.exists():
            with suppress(OSError):
                disk.rename(before, path)
        disk.remove_tree(temporary)
        raise _refused(path, error) from None
    except BaseException:
        disk.remove_tree(temporary)
        raise


def remove_directory(path: Path) -> None:
    """Remove a folder so that it never is half there; what cannot be removed stays under a temporary name."""
    temporary = _temporary(path)
    with suppress(OSError):
        disk.rename(path, temporary)
        disk.sync(path.parent)
        disk.remove_tree(temporary)


def remove_file(path: Path) -> None:
    """Remove a file, and its folder with the last one. What cannot be removed stays."""
    with suppress(OSError):
        disk.remove(path)
        if not any(path.parent.iterdir()):
            disk.remove(path.parent)


def sync_files(folder: Path) -> None:
    """Bring files that a library has written into a folder to the disk.

    Raises:
        OSError: the disk refuses; `directory_written_whole` makes it a StorageError.
    """
    for path in folder.iterdir():
        if path.is_file():
            disk.sync(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder under temporary names."""
    for path in folder.glob(".*.tmp"):
        disk.remove_tree(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be written ({error.strerror}); free space or permissions?")
