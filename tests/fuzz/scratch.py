"""One scratch folder of a process, in memory where the system has such a place, for parsers that take paths."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["scratch_folder", "write_scratch"]

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - folders in it are made by mkdtemp


@cache
def scratch_folder() -> Path:
    """An empty folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="sfedlora-fuzz-", dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_scratch(name: str, content: bytes) -> Path:
    """Write one file into the scratch folder, in place of the one before."""
    path = scratch_folder() / name
    path.write_bytes(content)
    return path
