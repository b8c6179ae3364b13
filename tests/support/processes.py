"""Real processes of the command line that can be killed, without paying for the imports every time.

One helper process imports sfedlora and computes nothing; each command is a fork of it with its own standard output and
error. Signals go to the fork's own process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Child", "ForkServer", "wait_until"]

PROGRAM = """
import json, os, signal, sys
import sfedlora.cli.progress, sfedlora.cli.tables, sfedlora.experiment, sfedlora.results
from sfedlora.cli import main
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            main(request["arguments"])
        except SystemExit as stop:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(stop.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc(), sys.stderr.flush()
            os._exit(99)
    print(json.dumps(pid), flush=True)
    sys.stdin.readline()
    _, status = os.waitpid(pid, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""


@dataclass
class Child:
    """One running command."""

    pid: int
    err_path: Path
    server: ForkServer

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to this one process."""
        os.kill(self.pid, signum)

    def wait(self) -> int:
        """Its exit code; minus the signal that ended it."""
        return self.server.reap()

    @property
    def err(self) -> str:
        return self.err_path.read_text(encoding="utf-8")


class ForkServer:
    """The helper process; one command at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder: Path, *arguments: str | Path) -> Child:
        """Start a command; its standard error goes to a file in `folder`."""
        assert self._process.stdin is not None
        request = {
            "arguments": [str(a) for a in arguments],
            "out": str(folder / "out.txt"),
            "err": str(folder / "err.txt"),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Child(self.answer(), folder / "err.txt", self)

    def reap(self) -> int:
        """The exit code of the command. Its process id stays taken until this is asked for: no signal goes astray."""
        assert self._process.stdin is not None
        self._process.stdin.write("wait\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        """The next number that the helper tells."""
        assert self._process.stdout is not None
        return int(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the helper."""
        self._process.communicate()


def wait_until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    """Poll often, so that short moments are met."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "this moment never came"
        time.sleep(0.0005)
