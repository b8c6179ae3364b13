"""Kills a program at every fault point, starts it again, and compares with a life without faults."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from crash.faults import Fault, Point, Watch, watch
from crash.victims import Victim

__all__ = [
    "KILLED",
    "MAX_SECONDS",
    "Counts",
    "Life",
    "Plan",
    "campaign",
    "difference",
    "leaving",
    "read_life",
    "second_fault",
    "write_life",
]

KILLED = -signal.SIGKILL
MAX_SECONDS = 900.0
"""After that a life counts as hung; a life takes two seconds where it has a core to itself."""


@dataclass(frozen=True)
class Plan:
    """Which faults are tried.

    Attributes:
        share: share of the fault points that are tried, 1 for all.
        power_share: share of the operations at which power is lost, too.
        random_times: kills at random times besides.
        seed: of the choice, the random times and the second kills.
    """

    share: float = 1.0
    power_share: float = 1.0
    random_times: int = 0
    seed: int = 0

    def choose(self, life: Life, rng: random.Random) -> list[Fault]:
        """The faults to try of those that an undisturbed life has."""
        faults = _faults(life)
        chosen = [one for one in faults if rng.random() < (self.power_share if one.power_loss else self.share)]
        return [*chosen, *(Fault("time", rng.uniform(0.05, 1.0) * life.seconds) for _ in range(self.random_times))]


@dataclass
class Counts:
    """What happened in a campaign, or in several."""

    fault_points: int = 0
    faults_tried: int = 0
    kills: int = 0
    power_losses: int = 0
    resumes: int = 0
    resumes_killed: int = 0
    mismatches: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add another campaign's."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Life:
    """How one child ended, and the operations and boundaries that it saw if it ended well."""

    code: int
    seconds: float
    points: tuple[Point, ...] = ()
    num_boundaries: int = 0

    @property
    def num_fault_points(self) -> int:
        """The places at which it can be killed."""
        return sum(not fault.power_loss for fault in _faults(self))

    def at(self, fault: Fault) -> str:
        """What was about to happen at a fault."""
        return str(self.points[int(fault.at)]) if fault.kind in ("operation", "torn") else ""


def second_fault(rng: random.Random) -> Fault | None:
    """For one life in four that goes on: where it is killed again, if it comes so far."""
    second = Fault("operation", rng.randrange(30), power_loss=rng.random() < 0.5)
    return second if rng.random() < 0.25 else None


def campaign(victim: Victim, work: Path, plan: Plan, say: Callable[[str], None]) -> Counts:
    """Try the faults of a plan on one program.

    Args:
        victim: the program.
        work: an empty folder.
        plan: which faults.
        say: called with a line about every mismatch.
    """
    shared, whole, folder = work / "shared", work / "whole", work / "run"
    shared.mkdir(parents=True)
    victim.prepare(shared)
    life = _live(victim, shared, whole, None, work)
    again = _live(victim, shared, whole, None, work)  # a program that stops itself goes on
    if life.code or again.code:
        raise RuntimeError(f"the program fails without any fault:\n{(work / 'error.txt').read_text(encoding='utf-8')}")
    expected = victim.result(whole)
    counts = Counts(fault_points=life.num_fault_points)
    rng = random.Random(plan.seed)  # noqa: S311 - a choice of tests
    for fault in plan.choose(life, rng):
        shutil.rmtree(folder, ignore_errors=True)
        counts.faults_tried += 1
        first = _live(victim, shared, folder, fault, work)
        if first.code not in (KILLED, 0):
            raise RuntimeError(f"{fault} itself failed:\n{(work / 'error.txt').read_text(encoding='utf-8')}")
        counts.kills += first.code == KILLED
        counts.power_losses += first.code == KILLED and fault.power_loss
        second = second_fault(rng)
        killed_again = _live(victim, shared, folder, second, work) if second is not None else None
        if second is not None and killed_again is not None and killed_again.code == KILLED:
            counts.kills += 1
            counts.resumes_killed += 1
            counts.power_losses += second.power_loss
        problem = _finish(victim, work, expected, counts)
        if problem:
            then = f", then {second}" if killed_again is not None else ""
            counts.mismatches.append(f"{fault} {life.at(fault)}{then}: {problem}")
            say(counts.mismatches[-1])
    return counts


def _faults(life: Life) -> Iterator[Fault]:
    """All faults of a life but those at random times."""
    for number, point in enumerate(life.points):
        yield Fault("operation", number)
        yield Fault("operation", number, power_loss=True)
        if point.operation == "write":
            yield Fault("torn", number)
    for number in range(life.num_boundaries):
        yield Fault("boundary", number)


def _finish(victim: Victim, work: Path, expected: Mapping[str, bytes], counts: Counts) -> str:
    """Start the program until it has ended well; what is wrong then, or nothing."""
    folder = work / "run"
    for _ in range(2):  # one that stops itself goes on once more
        life = _live(victim, work / "shared", folder, None, work)
        counts.resumes += 1
        if life.code:
            error = work / "error.txt"
            reason = error.read_text(encoding="utf-8") if error.exists() else f"no end within {MAX_SECONDS:g} s"
            return f"does not go on (exit {life.code}): {reason}"
        if victim.is_finished(folder):
            break
    return difference(expected, victim.result(folder))


def difference(expected: Mapping[str, bytes], found: Mapping[str, bytes]) -> str:
    """What differs, or nothing."""
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"differs in {', '.join(different)}" if different else ""


def _live(victim: Victim, shared: Path, folder: Path, fault: Fault | None, work: Path) -> Life:
    """One life of the program in a child."""
    report = work / "report.json"
    backups = work / "backups"
    for stale in (report, work / "error.txt"):
        stale.unlink(missing_ok=True)
    shutil.rmtree(backups, ignore_errors=True)
    backups.mkdir()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(victim, shared, folder, fault, work)
    end = begin + (fault.at if fault is not None and fault.kind == "time" else MAX_SECONDS)
    while (waited := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            waited = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    code, seconds = os.waitstatus_to_exitcode(waited[1]), time.monotonic() - begin
    return read_life(report, code, seconds)


def read_life(report: Path, code: int, seconds: float) -> Life:
    """How a child ended, with what it has written of itself if it ended well."""
    if code or not report.exists():
        return Life(code, seconds)
    content = json.loads(report.read_text(encoding="utf-8"))
    return Life(code, seconds, tuple(Point(*point) for point in content["points"]), content["num_boundaries"])


def _child(victim: Victim, shared: Path, folder: Path, fault: Fault | None, work: Path) -> None:
    """Live, then leave without any of the parent's exits."""
    with leaving(work / "error.txt"):
        watched = watch(fault, victim.watched(folder), work / "backups")
        victim.start(shared, folder, watched.boundary)
        write_life(work / "report.json", watched)


def write_life(report: Path, watched: Watch) -> None:
    """What a child has seen, for `read_life`."""
    content = {"points": [(p.operation, p.path) for p in watched.points], "num_boundaries": watched.num_boundaries}
    report.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def leaving(error: Path) -> Iterator[None]:
    """End a forked child after a block, whatever happens in it: it must never run on in its parent's code."""
    try:
        yield
        os._exit(0)
    except BaseException:
        error.write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
