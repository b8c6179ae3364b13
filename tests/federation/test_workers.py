"""Clients dealt over worker processes: the bits of one process, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfedlora import RunConfig, RunResult, run
from sfedlora.experiment import RunEvent, RunPrepared, run_events
from sfedlora.federation.round import ClientTrained, RoundStarted
from sfedlora.federation.runners.workers import WorkersRunner
from support.command_line import write_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes")


def _config(folder: Path, **sections: object) -> Path:
    return write_config(folder / "run.yaml", **{"runner": "serial", "output": str(folder / "run"), **sections})


def descendants() -> set[int]:
    """Process ids of all that this process started, directly or not, and that have not ended."""
    stats = [stat for path in Path("/proc").glob("[0-9]*/stat") if (stat := _read(path))]
    fields = {int(stat.split()[0]): stat.rpartition(")")[2].split() for stat in stats}
    parents = {pid: int(parent) for pid, (state, parent, *_) in fields.items() if state != "Z"}
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # a process that has ended meanwhile
        return ""


def assert_same_run(one: Path, other: Path) -> None:
    """Adapters and checkpoints byte for byte; metrics but for times."""
    for kind in ("adapters", "checkpoints"):
        files = sorted(path.relative_to(one) for path in (one / kind).rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(other) for path in (other / kind).rglob("*") if path.is_file())
        assert files
        for name in files:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert _untimed(one) == _untimed(other)
    assert (one / "summary.json").read_bytes() == (other / "summary.json").read_bytes()


def _untimed(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in records]


def kill_a_worker(events: Iterator[RunEvent], *, in_round: int) -> RunResult:
    """Drive a run in which a worker dies after it was given a client.

    It is stopped before the round and killed when another one has finished a client, so it cannot have finished its own.
    """
    runner, victim = None, 0
    for event in events:
        if isinstance(event, RunPrepared):
            runner = event.prepared.federation.runner
        if isinstance(event, RoundStarted) and event.round_num == in_round:
            assert isinstance(runner, WorkersRunner)
            victim = next(place.pid for place in runner.places if place is not None)
            os.kill(victim, signal.SIGSTOP)
        if isinstance(event, ClientTrained) and victim:
            os.kill(victim, signal.SIGKILL)
            victim = 0
        if isinstance(event, RunResult):
            return event
    raise AssertionError("the run has no result")


def test_two_workers_give_the_bits_of_one_process_though_one_is_killed_in_a_round(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    one = run(RunConfig.load(_config(tmp_path)))
    before = descendants()
    with pytest.warns(UserWarning, match=r"worker . \(process \d+ on .*\) died; Ray restarts it; its clients run again"):
        two = kill_a_worker(run_events(RunConfig.load(_config(tmp_path / "two", workers=2))), in_round=2)
    assert_same_run(one.run_dir, two.run_dir)
    assert not two.metrics[1]["excluded"]
    assert descendants() <= before
