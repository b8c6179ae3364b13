"""A fixed sample of the crash tests: killed anywhere, a run ends with the bytes of one that was not.

All of them: `make test-crash`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crash.harness import KILLED

RUN = Path(__file__).with_name("run.py")
FLOWER = ("Flower server, fedsa with fedyogi, kept moments", "Flower node, fedsa, kept moments, sits out")
SAMPLES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "local, serial": (("fedsa, serial, kept moments",), ["--share", "0.02", "--power-share", "0.03"]),
    "local, stacks": (("flora, stacks",), ["--share", "0.02", "--power-share", "0.04", "--random-times", "1"]),
    "across sites": (FLOWER, ["--share", "0.02", "--power-share", "0.02"]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_of_faults_loses_nothing(name: str, tmp_path: Path) -> None:
    assert KILLED == -9
    report = tmp_path / "report.json"
    scenes, options = SAMPLES[name]
    chosen = [part for scene in scenes for part in ("--scene", scene)]
    command = [sys.executable, str(RUN), *chosen, *options, "--report", str(report)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    counts = json.loads(report.read_text(encoding="utf-8"))
    assert counts["mismatches"] == []
    assert counts["fault_points"] > 100
    assert counts["kills"] >= 4
    assert counts["power_losses"] >= 1
    assert counts["resumes"] >= counts["faults_tried"] >= 4
