"""One process at a time in a folder.

The owner holds a lock of the kernel on the file `.owner` of the folder. The kernel lets go of it when the process ends
in whatever way, so a killed owner leaves a file but no lock, and the next one takes it over. The file says who it is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfedlora.errors import InputError, StorageError

__all__ = ["OWNER_FILE", "owned"]

OWNER_FILE = ".owner"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the one process that writes to a folder, until the block ends.

    Raises:
        InputError: another process is.
        StorageError: the folder cannot be written.
    """
    descriptor = _take(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            (folder / OWNER_FILE).unlink()
        os.close(descriptor)


def _take(folder: Path) -> int:
    """The descriptor of the locked file."""
    path = folder / OWNER_FILE
    while True:
        try:
            descriptor = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or permissions?") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise InputError(
                f"{folder}: in use by {owner}; wait until it has ended, or stop it, and give the command again"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise StorageError(f"{path}: cannot be locked ({error.strerror})") from None
            warnings.warn(
                f"{folder}: its file system has no locks; see to it that no other process works on it", stacklevel=3
            )
        if _is_still(path, descriptor):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # the owner before removed the file between our two calls


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether a path names the open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Say who owns it. That is for messages only, so a full disk does no harm."""
    who = {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode() + b"\n", 0)


def _owner(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {who['process']} on {who['machine']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
