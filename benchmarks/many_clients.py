"""Memory and seconds per round against the number of clients, cohort 10, on the tiny model of the package.

    python benchmarks/many_clients.py                            # 100, 1,000 and 10,000 clients
    python benchmarks/many_clients.py --clients 100 10000 --rounds 30

Each number of clients is a run in a process of its own, as the command line drives it, on generated chat pairs, 10 per
client. Anonymous resident memory (RssAnon of /proc/self/status, Linux) and time are read when a round has finished; a
round lasts from one `RoundFinished` to the next, so storing it counts too. The bars are those of the project: less than
200 MB more from the fewest to the most clients, and at most 1.1 times the seconds per round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfedlora import RunConfig
from sfedlora.experiment import run_events
from sfedlora.federation.round import RoundFinished

COHORT_SIZE, ROWS_PER_CLIENT = 10, 10
MEMORY_BAR, TIME_BAR = 200e6, 1.1
WORDS = "where is the old river and who has seen a small boat on it when the sun was low".split()


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        num_clients: clients of the federation.
        start_seconds: until round 1 begins: data, partition, model, initial evaluation.
        anonymous_bytes: RssAnon after the last round.
        round_seconds: median wall time of a round, the first left out.
        round_cpu_seconds: likewise, processor time of the process.
        store_bytes: the checkpoints on disk.
    """

    num_clients: int
    start_seconds: float
    anonymous_bytes: int
    round_seconds: float
    round_cpu_seconds: float
    store_bytes: int


def main() -> None:
    """Measure and print a line per number of clients, then the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(asdict(_measure(arguments.clients[0], arguments.rounds, arguments.child))))
        return
    _print_table([_in_own_process(num_clients, arguments.rounds) for num_clients in arguments.clients])


def _in_own_process(num_clients: int, num_rounds: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--clients", str(num_clients), "--rounds", str(num_rounds), "--child", folder]
        done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _measure(num_clients: int, num_rounds: int, folder: Path) -> Measured:
    data = folder / "rows.jsonl"
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
        "output": str(folder / "run"),
    }
    begin = time.perf_counter()
    walls, cpus = [], []
    for event in run_events(RunConfig.from_mapping(config)):
        if isinstance(event, RoundFinished):
            walls.append(time.perf_counter())
            cpus.append(time.process_time())
            anonymous = _anonymous_bytes()
    files = [path for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file()]
    return Measured(
        num_clients,
        walls[0] - begin,
        anonymous,
        _median_step(walls),
        _median_step(cpus),
        sum(path.stat().st_size for path in files),
    )


def _row(number: int) -> dict[str, str]:
    pick = [WORDS[(number * step + step) % len(WORDS)] for step in range(3, 15)]
    return {"prompt": " ".join(pick[:5]), "response": " ".join(pick[5:])}


def _median_step(times: Sequence[float]) -> float:
    return statistics.median(after - before for before, after in zip(times, times[1:], strict=False))


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("RssAnon is missing in /proc/self/status; this benchmark needs Linux")


def _print_table(measured: Sequence[Measured]) -> None:
    print(f"cohort {COHORT_SIZE}, {ROWS_PER_CLIENT} examples per client, evaluation.clients: cohort")
    print(f"{'clients':>8} {'start s':>8} {'RssAnon MB':>11} {'s/round':>8} {'cpu s/round':>12} {'checkpoints MB':>15}")
    for item in measured:
        print(
            f"{item.num_clients:>8} {item.start_seconds:>8.1f} {item.anonymous_bytes / 1e6:>11.1f} "
            f"{item.round_seconds:>8.3f} {item.round_cpu_seconds:>12.3f} {item.store_bytes / 1e6:>15.2f}"
        )
    fewest, most = measured[0], measured[-1]
    growth = most.anonymous_bytes - fewest.anonymous_bytes
    ratio = most.round_seconds / fewest.round_seconds
    print(f"growth of RssAnon {growth / 1e6:.1f} MB (bar: under {MEMORY_BAR / 1e6:.0f} MB)")
    print(f"seconds per round {ratio:.3f} x (bar: at most {TIME_BAR} x)")


if __name__ == "__main__":
    main()
