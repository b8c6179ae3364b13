"""The operations that change a disk, one function each.

Every operation is announced with `sys.audit` before it happens, so a test can watch a process, or end it at any of them
(`sys.addaudithook`); nothing here knows whether anybody listens. Events and what they carry:

    sfedlora.storage.write    path, file descriptor, content
    sfedlora.storage.sync     path of a file or folder
    sfedlora.storage.rename   path, new path
    sfedlora.storage.mkdir    path
    sfedlora.storage.remove   path of a file or an empty folder

No operation follows a link in the last part of a path. All raise OSError.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = [
    "PRIVATE_FILE",
    "PRIVATE_FOLDER",
    "append",
    "create",
    "make_folder",
    "remove",
    "remove_tree",
    "rename",
    "sync",
]

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


def create(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file that must not exist yet, and sync it. A private one is its owner's alone, whatever the umask."""
    _write(path, content, _NEW, private=private)


def append(path: Path, content: bytes) -> None:
    """Write to the end of a file, and sync it."""
    _write(path, content, _APPEND, private=False)


def make_folder(path: Path, *, private: bool = False) -> None:
    """Make a folder; one that exists is left as it is, but for the permissions of a private one."""
    sys.audit("sfedlora.storage.mkdir", path)
    path.mkdir(mode=PRIVATE_FOLDER if private else 0o777, exist_ok=True)
    if private:
        path.chmod(PRIVATE_FOLDER)


def rename(path: Path, to: Path) -> None:
    """Give a file another name, in place of a file of that name; or a folder a name that is free."""
    sys.audit("sfedlora.storage.rename", path, to)
    path.replace(to)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        sys.audit("sfedlora.storage.sync", path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or an empty folder."""
    sys.audit("sfedlora.storage.remove", path)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a folder with all in it, or as much as can be removed. Links are removed, not followed."""
    walked = () if path.is_symlink() else os.walk(path, topdown=False)  # walk itself follows the first link
    for folder, folders, files in walked:
        for name in (*files, *folders):
            _try_to_remove(Path(folder, name))
    _try_to_remove(path)


def _try_to_remove(path: Path) -> None:
    try:
        remove(path)
    except OSError:  # not there, or not empty, because something in it cannot be removed
        return


def _write(path: Path, content: bytes, flags: int, *, private: bool) -> None:
    descriptor = os.open(path, flags, PRIVATE_FILE if private else 0o666)
    try:
        if private:
            os.fchmod(descriptor, PRIVATE_FILE)
        sys.audit("sfedlora.storage.write", path, descriptor, content)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        sys.audit("sfedlora.storage.sync", path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
