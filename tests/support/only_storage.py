"""Runs something in this process and tells what it wrote below its run directory past `sfedlora.storage`.

    python -m support.only_storage {local|server|careless} FOLDER

A process of its own, because an audit hook stays until the process ends. Two things are compared:

- every file that Python opens for writing, and every name that it changes, has a function of `sfedlora.storage` on the
  stack that does it;
- in the end the folder holds what the storage layer announced (`sfedlora.storage.*`), and nothing else, byte for byte.
  That also finds what libraries write without Python.

Excepted is the spool: the outcomes of a round that wait for the others, in files that live as long as the process.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Watch"]

SPOOL = re.compile(r"(^|/)\.spool-[^/]*\.tmp(/|$)")
_PREFIX = "sfedlora.storage."
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (0, 1),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "shutil.copyfile": (1,),
    "shutil.move": (1,),
}
"""Event -> which of its arguments are paths that it changes."""
_FOLDER_DESCRIPTORS = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2}
"""Event -> where it carries the open folder that its path is relative to."""


class Watch:
    """What is written below a folder, and by whom."""

    def __init__(self, folder: Path) -> None:
        """Watch from now until the process ends."""
        self.past_storage: list[str] = []
        self._folder = folder
        self._announced: dict[Path, bytes | None] = {}  # None: a folder
        self._pending: dict[int, Callable[[], None]] = {}  # thread -> the operation that it is in
        sys.addaudithook(self._hook)

    def differences(self) -> list[str]:
        """Names below the folder that are not as announced."""
        for thread in list(self._pending):
            self._pending.pop(thread)()
        found = {
            path: None if path.is_dir() else path.read_bytes()
            for path in (self._folder, *self._folder.rglob("*"))
            if not SPOOL.search(str(path))
        }
        names = found.keys() | self._announced.keys()
        return sorted(str(path) for path in names if found.get(path, "nothing") != self._announced.get(path, "nothing"))

    def num_announced(self) -> int:
        """How many files the folder should hold."""
        return sum(content is not None for content in self._announced.values())

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_PREFIX):
            self._storage(event.removeprefix(_PREFIX), args)
        elif event == "open":
            if isinstance(args[2], int) and args[2] & _WRITING:
                self._changed(event, args[0])
        elif event in _CHANGES:
            at = _FOLDER_DESCRIPTORS.get(event)
            within = args[at] if at is not None and len(args) > at else -1
            for number in _CHANGES[event]:
                self._changed(event, args[number], within if isinstance(within, int) else -1)

    def _changed(self, event: str, name: Any, within: int = -1) -> None:
        """Something outside or inside of the storage layer changes a name."""
        if not isinstance(name, str | bytes | os.PathLike):
            return
        parent = f"/proc/self/fd/{within}" if within >= 0 else "."
        path = Path(os.path.realpath(parent), os.fsdecode(name))
        if (path == self._folder or self._folder in path.parents) and not SPOOL.search(str(path)):
            frame: FrameType | None = sys._getframe(2)
            callers = []
            while frame is not None:
                callers.append(frame.f_code.co_filename)
                frame = frame.f_back
            if not any("/sfedlora/storage/" in caller for caller in callers):
                ours = [caller for caller in callers if "/sfedlora/" in caller]
                self.past_storage.append(f"{event} {path} by {(ours or callers)[0]}")

    def _storage(self, operation: str, args: tuple[Any, ...]) -> None:
        """The storage layer is about to do something; what this thread announced before has happened."""
        thread = threading.get_ident()
        if thread in self._pending:
            self._pending.pop(thread)()
        path = args[0]
        if path != self._folder and self._folder not in path.parents:
            return
        known = self._announced
        if operation == "write":
            known[path] = (known.get(path) or b"") + args[2]
        elif operation == "mkdir":
            known.setdefault(path, None)
        elif operation == "rename":
            self._pending[thread] = lambda: self._renamed(path, args[1])
        elif operation == "remove":
            self._pending[thread] = lambda: self._removed(path)

    def _removed(self, path: Path) -> None:
        if not os.path.lexists(path):  # or it was refused
            self._announced.pop(path, None)

    def _renamed(self, path: Path, to: Path) -> None:
        for name in [name for name in self._announced if name == path or path in name.parents]:
            self._announced[to / name.relative_to(path) if name != path else to] = self._announced.pop(name)


def _local(folder: Path, *, watch: Callable[[Path], Watch]) -> Watch:
    """A run of this machine that is stopped in its second round and goes on."""
    from crash.victims import Run

    options = {"local": {"optimizer_state": "keep", "local_steps": 1}}
    run = Run(options, ("runner=serial",), stop_after=3)
    (folder / "shared").mkdir()
    run.prepare(folder / "shared")
    watched = watch(folder / "run")
    for _ in range(2):
        run.start(folder / "shared", folder / "run", lambda: None)
    if not run.is_finished(folder / "run"):
        raise RuntimeError("the run did not finish")
    return watched


def _server(folder: Path, *, watch: Callable[[Path], Watch]) -> Watch:
    """A server with two sites that is stopped in its second round and goes on; what the sites keep is watched too."""
    from crash.deployment import Deployment
    from crash.flower_server import Server

    server = Server(Deployment({"local__optimizer_state": "keep", "rounds__server_optimizer": "fedyogi"}))
    (folder / "shared").mkdir()
    server.prepare(folder / "shared")
    watched = watch(folder / "run")
    moments = iter(range(10**6))

    def stop() -> None:
        if next(moments) == 12:
            raise KeyboardInterrupt

    try:
        server.start(folder / "shared", folder / "run", stop)
    except KeyboardInterrupt:
        server.start(folder / "shared", folder / "run", stop)
    if not server.is_finished(folder / "run"):
        raise RuntimeError("the run did not finish")
    return watched


def _careless(folder: Path, *, watch: Callable[[Path], Watch]) -> Watch:
    """Writes past the storage layer in three ways, of which one is not Python's."""
    import torch
    from safetensors.torch import save_file

    from sfedlora.storage import make_directory, write_text

    watched = watch(folder / "run")
    make_directory(folder / "run")
    write_text(folder / "run" / "a", "by the storage layer")
    (folder / "run" / "b").write_text("past it", encoding="utf-8")
    (folder / "run" / "a").rename(folder / "run" / "c")
    save_file({"x": torch.ones(2)}, folder / "run" / "d")
    return watched


def main() -> int:
    """1 where anything was written past the storage layer."""
    what, folder = {"local": _local, "server": _server, "careless": _careless}[sys.argv[1]], Path(sys.argv[2])
    import torch

    torch.set_num_threads(1)
    watched = what(folder, watch=Watch)
    for line in (*watched.past_storage, *watched.differences()):
        print(line)
    print(f"{watched.num_announced()} files")
    return 1 if watched.past_storage or watched.differences() else 0


if __name__ == "__main__":
    sys.exit(main())
