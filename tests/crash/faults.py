"""Faults of a process: SIGKILL before an operation of the storage layer, inside a write, or at a boundary of a round.

The storage layer announces every operation to Python's audit hooks; a hook is installed here in a forked child, which
ends with its hook. `lose_power` makes of a kill a power loss under the strictest reading of POSIX: what was written
and not synced is torn, and every name whose folder was not synced since is as it was before.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Fault", "Point", "Watch", "watch"]

_PREFIX = "sfedlora.storage."


@dataclass(frozen=True)
class Fault:
    """When a process ends.

    Attributes:
        kind: `operation`: before the operation of that number; `torn`: in the middle of the write of that number;
            `boundary`: at the event of that number that the program yields; `time`: after so many seconds.
        at: number from 0, or seconds.
        power_loss: what was not synced is lost, too.
    """

    kind: Literal["operation", "torn", "boundary", "time"]
    at: float
    power_loss: bool = False


@dataclass(frozen=True)
class Point:
    """One operation of an uninterrupted run: what and, below the watched folder, where."""

    operation: str
    path: str


@dataclass
class _PowerLoss:
    """What a power loss takes back: the operations since the last sync of their file or folder.

    Attributes:
        backups: folder for files that a removal or a rename may have to give back.
        names: the files that there are; another one that is written to is new.
        dirty: file -> its size when it was last synced.
        pending: changes of names whose folder was not synced since.
        unfinished: what to note of the operation that is under way.
    """

    backups: Path
    names: set[Path]
    dirty: dict[Path, int] = field(default_factory=dict)
    pending: list[tuple[str, Path, Path | None, Path | None]] = field(default_factory=list)
    unfinished: Callable[[], None] | None = None

    def note(self, operation: str, args: tuple[Any, ...]) -> None:
        """An operation is about to happen; the one before it has."""
        if self.unfinished is not None:
            self.unfinished()
        path: Path = args[0]
        if operation == "write":
            size = os.fstat(args[1]).st_size
            if path not in self.names:
                self.names.add(path)
                self.pending.append(("create", path, None, None))
            self.unfinished = lambda: self._written(path, size)
        elif operation == "sync":
            self.unfinished = lambda: self._synced(path)
        elif operation == "mkdir":
            existed = path.is_dir()
            self.unfinished = lambda: None if existed else self.pending.append(("mkdir", path, None, None))
        elif operation == "rename":
            to: Path = args[1]
            backup = self._backup(to)
            self.unfinished = lambda: self._renamed(path, to, backup)
        else:
            backup, is_folder = self._backup(path), path.is_dir() and not path.is_symlink()
            kind = "remove folder" if is_folder else "remove"
            self.unfinished = lambda: self._removed(kind, path, backup)

    def lose(self) -> None:
        """Take everything back that no sync has made last."""
        for path, size in self.dirty.items():
            if path.is_file():
                os.truncate(path, size + (path.stat().st_size - size) // 2)
        for kind, path, to, backup in reversed(self.pending):
            if not path.parent.is_dir():  # a folder whose removal has lasted took it along
                continue
            if kind == "create":
                path.unlink(missing_ok=True)
            elif kind == "mkdir":
                shutil.rmtree(path, ignore_errors=True)
            elif kind == "rename" and to is not None:
                to.rename(path)
                if backup is not None:
                    os.link(backup, to)
            elif kind == "remove folder":
                path.mkdir()
            elif backup is not None:
                os.link(backup, path)

    def _written(self, path: Path, size_before: int) -> None:
        self.dirty.setdefault(path, size_before)

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self.pending = [item for item in self.pending if path not in (item[1].parent, (item[2] or item[1]).parent)]
        self.dirty.pop(path, None)

    def _removed(self, kind: str, path: Path, backup: Path | None) -> None:
        if not path.exists():  # or it was refused
            self.names.discard(path)
            self.pending.append((kind, path, None, backup))

    def _renamed(self, path: Path, to: Path, backup: Path | None) -> None:
        if path.exists() or not to.exists():  # it was refused
            return
        self.pending.append(("rename", path, to, backup))
        for name in [name for name in self.names if name == path or path in name.parents]:
            after = to / name.relative_to(path) if name != path else to
            self.names.remove(name)
            self.names.add(after)
            if name in self.dirty:
                self.dirty[after] = self.dirty.pop(name)

    def _backup(self, path: Path) -> Path | None:
        if not path.is_file() or path.is_symlink():
            return None
        backup = self.backups / str(len(os.listdir(self.backups)))  # noqa: PTH208 - a count
        os.link(path, backup)
        return backup


class Watch:
    """What the hook of one process does: counts operations, and ends the process at its fault."""

    def __init__(self, fault: Fault | None, folder: Path, backups: Path) -> None:
        self.points: list[Point] = []
        self.num_boundaries = 0
        self._fault, self._folder = fault, folder
        names = {path for path in folder.rglob("*") if not path.is_dir()}
        self._loss = _PowerLoss(backups, names) if fault is not None and fault.power_loss else None

    def operation(self, operation: str, args: tuple[Any, ...]) -> None:
        """An operation is about to happen."""
        if self._loss is not None:
            self._loss.note(operation, args)
        if self._fault is not None and self._fault.at == len(self.points):
            if self._fault.kind == "torn" and operation == "write":
                os.write(args[1], args[2][: len(args[2]) // 2])
                self._end()
            if self._fault.kind == "operation":
                self._end()
        self.points.append(Point(operation, os.path.relpath(args[0], self._folder)))

    def boundary(self) -> None:
        """The program has yielded an event."""
        if self._fault is not None and self._fault.kind == "boundary" and self._fault.at == self.num_boundaries:
            self._end()
        self.num_boundaries += 1

    def _end(self) -> None:
        if self._loss is not None:
            self._loss.lose()
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def watch(fault: Fault | None, folder: Path, backups: Path) -> Watch:
    """Watch this process's operations in and below a folder; there is no way back, so do it in a child.

    The sync that makes the folder's own name last is one of them: without it a power loss would take all there is.
    """
    watched = Watch(fault, folder, backups)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not event.startswith(_PREFIX):
            return
        operation = event.removeprefix(_PREFIX)
        if args[0] == folder or folder in args[0].parents or (operation == "sync" and args[0] == folder.parent):
            watched.operation(operation, args)

    sys.addaudithook(hook)
    return watched
