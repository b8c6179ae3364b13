"""Nothing that is started for a federation looks for anybody outside this machine: every `connect` is watched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flower.deployment import BIN
from flower.federations import chat_config
from sfedlora.flower.app_files import write_app

ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)")')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "federation"
    write_app(folder, chat_config(tmp_path, rounds__num_rounds=1))
    yield folder
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(folder / "home"):
                process.kill()


def test_a_simulation_connects_to_this_machine_only(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "connects.txt"
    command = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(trace), str(BIN / "sfedlora")]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "flower", "run", str(folder)],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "run" / "summary.json").is_file()
    seen = {(match[2] or match[3], match[1]) for match in ADDRESS.finditer(trace.read_text(errors="replace"))}
    assert seen, "no connection was seen, not even to the link: the trace is not what it should be"
    outside = sorted((host, port) for host, port in seen if not _is_here(host))
    assert outside == []


def _is_here(host: str) -> bool:
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return host.startswith(("127.", "::ffff:127.")) or host in {"::1", *own}
