"""What a user sees while a run goes: bars on a terminal that never pass their total, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sfedlora.cli.progress import drive_all
from sfedlora.compare import compare_events
from sfedlora.config.grid import Axis, make_cells
from sfedlora.errors import Interrupted
from sfedlora.federation.round import ClientTrained
from support.command_line import sfedlora, start, write_config
from support.processes import ForkServer

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = sfedlora(capsys, "run", write_config(tmp_path / "run.yaml", output=str(tmp_path / "run")))
    assert not ESCAPES.search(outcome.out + outcome.err)
    lines = outcome.err.splitlines()
    assert lines[0] == "package:sfedlora/assets/tiny_llama: float32, cpu, 1 threads"
    assert "3 clients, method fedsa, rank 4 with gamma 6.928, scaling sfed" in lines[1]
    assert lines[2].startswith("each of 2 rounds: 3 of 3 clients with 48 training examples, 2 steps each, about ")
    assert lines[3].startswith("expected time: roughly ")
    assert [line.split(":")[0] for line in lines[4:]] == ["round 1/2", "round 2/2"]
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    tokens, megabytes = re.findall(r"about (\d+) tokens, ([0-9.]+) MB to the server", lines[2])[0]
    assert int(tokens) == pytest.approx(metrics["tokens"], rel=0.3)
    assert float(megabytes) == pytest.approx(metrics["bytes_up"] / 1e6, abs=0.06)
    for word in ("initial", "last", "best", "validation", "test", "perplexity"):
        assert word in outcome.out
    assert f"run directory: {tmp_path / 'run'}" in outcome.out


@pytest.mark.slow
def test_bars_on_a_terminal(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", local={"local_steps": 20}, output=str(tmp_path / "run"))
    leader, follower = pty.openpty()
    process = start("run", config, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    process.communicate()
    os.close(leader)
    assert process.returncode == 0
    text = ESCAPES.sub("", shown.decode())
    counts = [(int(done), int(total)) for done, total in re.findall(r"(\d+)/(\d+) ", text)]
    assert counts
    assert all(done <= total for done, total in counts)
    for bar in ("rounds", "clients", "evaluation"):
        assert bar in text
    assert "round 2/2: train loss" in text


def test_a_stopped_comparison_goes_on_with_the_same_command(tmp_path: Path) -> None:
    cells = make_cells(write_config(tmp_path / "run.yaml"), [], [Axis.of_key("seed", ["0", "1"])], tmp_path / "grid")

    def pressing() -> Iterator[Any]:
        inner = compare_events(cells, tmp_path / "grid")
        for event in inner:
            if isinstance(event, ClientTrained):
                signal.raise_signal(signal.SIGINT)
            try:
                yield event
            except Interrupted as stop:
                cast("Any", inner).throw(stop)

    with pytest.raises(Interrupted, match="the same command again"):
        list(drive_all(pressing()))
    assert (Path(cells[0].config.output) / "checkpoints" / "partial").is_dir()


@pytest.mark.slow
def test_warnings_and_messages_of_a_real_process(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", lora={"init": "shared"}, output=str(tmp_path / "run"))
    server = ForkServer()
    try:
        child = server.start(tmp_path, "run", config, "partition.min_examples=60")
        assert child.wait() == 0, child.err
        assert child.err.count("warning: ") == 1
        refused = server.start(tmp_path, "run", config)
        assert refused.wait() == 2
        assert refused.err.startswith("error: output: ")
        assert refused.err.count("\n") == 1
    finally:
        server.close()
