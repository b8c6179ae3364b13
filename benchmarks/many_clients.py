"""Memory and seconds per round against the number of clients, cohort 10, on the tiny model of the package.

    python benchmarks/many_clients.py                            # 10, 100, 1,000 and 10,000 clients
    python benchmarks/many_clients.py --clients 100 10000 --rounds 30
    python benchmarks/many_clients.py --stored                   # with a file of every client before the first round

Runs are those of the command line, on generated chat pairs, 10 per client; a round lasts until the next one begins.

- RssAnon (of /proc/self/status, Linux) after the last round, the wall time until round 1 ends, and wall time per round,
  each of a run in a process of its own. Where a round is shorter than the disk takes to store the one before, the disk
  decides that last time; the number of its writes does not depend on the number of clients.
- interleaved: the runs take turns, round by round, in one process, so that all meet the same load of the machine; wall
  time, and processor time of all threads. 100 clients run twice, and their ratio shows what noise is left.

Bars from 100 clients (the fewest, where 100 are not among them) to the most: less than 200 MB more, and at most 1.1
times the interleaved wall seconds per round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

from sfedlora import RunConfig
from sfedlora.artifacts import Checkpoints, CheckpointWriter
from sfedlora.errors import Interrupted
from sfedlora.experiment import RunEvent, RunPrepared, resume_events, run_events
from sfedlora.federation.round import RoundFinished

COHORT_SIZE, ROWS_PER_CLIENT, WARM_UP_ROUNDS = 10, 10, 2
BASE = 100
"""Clients that the others are held against."""
MEMORY_BAR, TIME_BAR = 200e6, 1.1
WORDS = ("where", "is", "the", "old", "river", "who", "has", "seen", "a", "small", "boat", "when", "sun", "was", "low")


@dataclass(frozen=True)
class Alone:
    """A run in a process of its own.

    Attributes:
        start_seconds: until the first round has ended: data, partition, model, initial evaluation, round.
        anonymous_bytes: RssAnon after the last round.
        round_seconds: median of the later rounds.
        checkpoint_bytes: the checkpoints on disk.
    """

    start_seconds: float
    anonymous_bytes: int
    round_seconds: float
    checkpoint_bytes: int


def main() -> None:
    """Measure and print a line per number of clients, then the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--stored", action="store_true", help="give every client a file first")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    numbers: list[int] = arguments.clients
    with tempfile.TemporaryDirectory() as folder:
        if arguments.alone:
            print(json.dumps(asdict(_alone(numbers[0], arguments.rounds, Path(folder), stored=arguments.stored))))
            return
        interleaved = _interleaved([*numbers, _base(numbers)], arguments.rounds, Path(folder), stored=arguments.stored)
    alone = [_in_own_process(number, arguments.rounds, stored=arguments.stored) for number in numbers]
    _print_table(numbers, alone, interleaved)


def _in_own_process(num_clients: int, num_rounds: int, *, stored: bool) -> Alone:
    options = ["--clients", str(num_clients), "--rounds", str(num_rounds), "--alone", *(["--stored"] if stored else [])]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    return Alone(**json.loads(done.stdout.splitlines()[-1]))


def _alone(num_clients: int, num_rounds: int, folder: Path, *, stored: bool) -> Alone:
    begin = time.perf_counter()
    events = _run(num_clients, num_rounds, folder, stored=stored)
    ends, anonymous = [], 0
    for event in events:
        if isinstance(event, RoundFinished):
            ends.append(time.perf_counter())
            anonymous = _anonymous_bytes()
    files = [path for path in folder.glob("run-*/checkpoints/**/*") if path.is_file()]
    return Alone(
        ends[0] - begin,
        anonymous,
        statistics.median(after - before for before, after in pairwise(ends[WARM_UP_ROUNDS - 1 :])),
        sum(path.stat().st_size for path in files),
    )


def _interleaved(numbers: Sequence[int], num_rounds: int, folder: Path, *, stored: bool) -> list[tuple[float, float]]:
    """Median wall and processor seconds per round of runs that take turns."""
    runs = []
    for place, number in enumerate(numbers):
        (folder / str(place)).mkdir()
        runs.append(_run(number, num_rounds, folder / str(place), stored=stored))
    seconds: list[list[tuple[float, float]]] = [[] for _ in runs]
    for turn in range(num_rounds - (1 if stored else 0)):
        for place in sorted(range(len(runs)), key=lambda place: (place + turn) % len(runs)):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            next(event for event in runs[place] if isinstance(event, RoundFinished))
            seconds[place].append((time.perf_counter() - begin, time.process_time() - begin_cpu))
    medians = []
    for values in seconds:
        wall, cpu = zip(*values[WARM_UP_ROUNDS:], strict=True)
        medians.append((statistics.median(wall), statistics.median(cpu)))
    return medians


def _run(num_clients: int, num_rounds: int, folder: Path, *, stored: bool) -> Iterator[RunEvent]:
    data, run_dir = folder / "rows.jsonl", folder / f"run-{num_clients}"
    data.write_text("".join(json.dumps(_row(number)) + "\n" for number in range(num_clients * ROWS_PER_CLIENT)))
    config = {
        "preset": "sfed-lora",
        "model": {"source": "package:sfedlora/assets/tiny_llama"},
        "data": {"source": str(data), "max_length": 48},
        "partition": {"scheme": "iid", "num_clients": num_clients, "min_examples": ROWS_PER_CLIENT},
        "lora": {"rank": 8, "alpha": 8},
        "rounds": {"num_rounds": num_rounds, "cohort_size": COHORT_SIZE},
        "local": {"learning_rate": 1e-2, "local_steps": 4, "batch_size": 4},
        "evaluation": {"clients": "cohort"},
        "threads": 1,
        "output": str(run_dir),
    }
    events = run_events(RunConfig.from_mapping(config))
    if stored:
        _store_everyone(events, run_dir)
        events = resume_events(run_dir)
    return events


def _store_everyone(events: Iterator[RunEvent], run_dir: Path) -> None:
    """Run one round, then write a file for every client, as if all had taken part in it."""
    prepared = next(event.prepared for event in events if isinstance(event, RunPrepared))
    next(event for event in events if isinstance(event, RoundFinished))
    with suppress(Interrupted):
        cast("Generator[RunEvent]", events).throw(Interrupted("stop"))
    checkpoints = Checkpoints(run_dir / "checkpoints")
    checkpoint = checkpoints.load(1)
    everyone = dict.fromkeys(prepared.federation.splits, next(iter(checkpoint.state.personal.values())))
    state = replace(checkpoint.state, personal=everyone)
    CheckpointWriter(checkpoints).save(replace(checkpoint, state=state), changed=everyone.keys(), best_round=None)


def _row(number: int) -> dict[str, str]:
    pick = [WORDS[(number * step + step) % len(WORDS)] for step in range(3, 15)]
    return {"prompt": " ".join(pick[:5]), "response": " ".join(pick[5:])}


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("RssAnon is missing in /proc/self/status; this benchmark needs Linux")


def _base(numbers: Sequence[int]) -> int:
    return BASE if BASE in numbers else numbers[0]


def _print_table(numbers: Sequence[int], alone: Sequence[Alone], interleaved: Sequence[tuple[float, float]]) -> None:
    print(f"cohort {COHORT_SIZE}, {ROWS_PER_CLIENT} examples per client, evaluation.clients: cohort")
    print(" clients  start s  RssAnon MB  checkpoints MB  s/round alone | interleaved: wall s   ratio   cpu s   ratio")
    base = numbers.index(_base(numbers))
    base_wall, base_cpu = interleaved[base]
    for number, item, (wall, cpu) in zip([*numbers, _base(numbers)], [*alone, None], interleaved, strict=True):
        own = (
            " " * 54
            if item is None
            else (
                f" {item.start_seconds:>8.1f} {item.anonymous_bytes / 1e6:>11.1f} "
                f"{item.checkpoint_bytes / 1e6:>15.2f} {item.round_seconds:>14.3f} "
            )
        )
        print(f"{number:>8}{own} {wall:>20.3f} {wall / base_wall:>7.3f} {cpu:>7.3f} {cpu / base_cpu:>7.3f}")
    growth = alone[-1].anonymous_bytes - alone[base].anonymous_bytes
    print(f"growth of RssAnon {growth / 1e6:.1f} MB (bar: under {MEMORY_BAR / 1e6:.0f} MB)")
    ratio = interleaved[len(numbers) - 1][0] / base_wall
    print(f"seconds per round {ratio:.3f} x (bar: at most {TIME_BAR} x)")


if __name__ == "__main__":
    main()
