"""Whole runs write below their run directory through `sfedlora.storage` only, so its promises hold for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def _watched(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "support.only_storage", what, str(folder)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize(("what", "least"), [("local", 20), ("server", 20)])
def test_a_whole_run_writes_through_the_storage_layer_only(what: str, least: int, tmp_path: Path) -> None:
    """The server's sites are in it: what they keep is written in the same way."""
    pytest.importorskip("flwr")  # not among the lowest versions that `make test-minimum` installs
    finished = _watched(what, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    *past, count = finished.stdout.splitlines()
    assert past == []
    assert int(count.split()[0]) >= least


def test_what_is_written_past_it_would_be_found(tmp_path: Path) -> None:
    finished = _watched("careless", tmp_path)
    assert finished.returncode == 1, finished.stderr
    lines = finished.stdout.splitlines()
    run = tmp_path / "run"
    assert any(line.startswith(f"open {run}/b by ") for line in lines)
    assert any(line.startswith(f"os.rename {run}/c by ") for line in lines)
    assert f"{run}/d" in lines  # a library wrote it, without Python
