"""The README's commands: an app is written and played by Flower's simulation, with the bytes of `sfedlora run`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from flower.federations import CHAT, TINY
from sfedlora import RunConfig, run
from support.command_line import sfedlora

FILES = ("adapter_model.safetensors", "adapter_config.json")
MANAGED_PORT = 39091
"""Flower's own choice for the link that it starts for simulations."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The folder of an app; the link that Flower leaves running for it is ended."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", MANAGED_PORT)) == 0:
            pytest.skip(f"a link of somebody else listens on port {MANAGED_PORT}")
    yield tmp_path / "federation"
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(tmp_path / "federation" / "home"):
                process.kill()


def test_init_and_run_give_the_bytes_of_the_serial_runner(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "preset": "sfed-lora",
        "model": {"source": TINY},
        "data": {"source": CHAT},
        "partition": {"scheme": "column", "column": "topic", "num_clients": 3},
        "lora": {"rank": 4},
        "local": {"local_steps": 2, "batch_size": 4},
        "threads": 1,
        "output": str(tmp_path / "local"),
    }
    source = tmp_path / "federation.yaml"
    source.write_text(yaml.safe_dump(values))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert sfedlora(capfd, "flower", "init", str(home), "--config", str(source)).code == 0
    again = sfedlora(capfd, "flower", "init", str(home), "--config", str(source))
    assert (again.code, "no empty folder" in again.err) == (2, True)
    outcome = sfedlora(capfd, "flower", "run", str(home), "rounds.num_rounds=2")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "round 2/2: 3 of 3 sites" in outcome.out
    assert "uv sync" not in outcome.out

    local = run(RunConfig.load(source, ["rounds.num_rounds=2", "runner=serial"])).run_dir
    for name in FILES:
        assert (home / "run/adapters/shared" / name).read_bytes() == (local / "adapters/shared" / name).read_bytes()
        for client in sorted((local / "adapters/clients").iterdir()):
            [own] = (home.parent / "federation/run-sites").glob(f"*/{client.name}/adapter")
            assert (own / name).read_bytes() == (client / name).read_bytes()

    second = sfedlora(capfd, "flower", "run", str(home), "rounds.num_rounds=2")
    assert second.code == 3
    assert "already holds another run" in second.out
