"""What a round across sites costs: a link and nodes on loopback with TLS and node keys, on the tiny model.

    python benchmarks/deployment.py                              # 3 nodes, adapters of 1 and 50 MB
    python benchmarks/deployment.py --nodes 3 10 --megabytes 50 --rounds 3
    python benchmarks/deployment.py --trainer none               # the base model is loaded for every message

Per setting: seconds of a round and of the training in it, bytes up and down, and the peak memory (VmHWM) of the server
app, the link, the largest node, client process and trainer. A rank is chosen so that A, which `fedsa` shares, has the
size asked for; local training is one step of SGD.

Bars: the server app at most 7 messages + 0.5 GB; a round of 3 nodes with 1 MB and a warm trainer at most 10 s above the
training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from flower.deployment import Deployment  # the same processes as in the tests
from sfedlora import RunConfig

BYTES_PER_RANK = 4 * 64 * 4
"""Of A in the tiny model: four modules of 64 inputs, float32."""
ROWS_PER_SITE = 12
KINDS = {
    "serverapp": "server app",
    "flower-superlink": "link",
    "flower-supernode": "node",
    "clientapp": "client process",
}


@dataclass(frozen=True)
class Setting:
    """One deployment."""

    num_nodes: int
    megabytes: float
    trainer: str


@dataclass(frozen=True)
class Measured:
    """What it took; seconds are medians over the rounds after the first."""

    setting: Setting
    round_seconds: float
    bytes_up: int
    bytes_down: int
    peak_bytes: dict[str, int]
    model_loads: int


def main() -> None:
    """Measure every setting, print a line each, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nodes", nargs="+", type=int, default=[3])
    parser.add_argument("--megabytes", nargs="+", type=float, default=[1.0, 50.0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trainer", default="process", choices=["process", "none"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for num_nodes in arguments.nodes:
        for megabytes in arguments.megabytes:
            measured = _measure(Setting(num_nodes, megabytes, arguments.trainer), arguments.rounds)
            found.append(measured)
            _show(measured)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


def _measure(setting: Setting, num_rounds: int) -> Measured:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _files(folder, setting.num_nodes)
        with Deployment.write(
            folder / "federation", _config(setting, num_rounds, list(files)), num_nodes=len(files)
        ) as run:
            run.start_link()
            for number, (client_id, path) in enumerate(files.items()):
                run.register(number)
                node = {"client-id": client_id, "data": str(path), "state-dir": str(run.root / f"state{number}")}
                run.start_node(number, node | {"trainer": setting.trainer})
            with _peaks(run) as peaks:
                run.submit()
                ends = []
                for round_num in range(1, num_rounds + 1):
                    run.wait_for_file(f"checkpoints/round-{round_num:06d}", seconds=1800)
                    ends.append(time.monotonic())
                run.wait_for_file("summary.json", seconds=1800)
            lines = [json.loads(line) for line in (run.root / "run" / "metrics.jsonl").read_text().splitlines()]
            logs = [path.read_text() for path in run.root.glob("state*/trainer.log")]
        between = [after - before for before, after in itertools.pairwise(ends)]
        return Measured(
            setting,
            statistics.median(between),
            lines[-1]["bytes_up"],
            lines[-1]["bytes_down"],
            dict(peaks),
            sum(log.count("trainer of site") for log in logs),
        )


def _config(setting: Setting, num_rounds: int, sites: list[str]) -> RunConfig:
    rank = max(1, round(setting.megabytes * 1e6 / BYTES_PER_RANK))
    return RunConfig.from_mapping(
        {
            "model": {"source": "package:sfedlora/assets/tiny_llama"},
            "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "max_length": 32},
            "partition": {"scheme": "iid", "num_clients": len(sites)},
            "lora": {"rank": rank, "alpha": 1, "scaling": "rslora", "init": "shared"},
            "rounds": {"num_rounds": num_rounds},
            "local": {"optimizer": "sgd", "local_steps": 1, "batch_size": 1},
            "flower": {"sites": sites, "federation_id": "bench"},
            "threads": 1,
        }
    )


def _files(folder: Path, num_sites: int) -> dict[str, Path]:
    files = {}
    for number in range(num_sites):
        path = folder / f"site{number}.jsonl"
        rows = [{"prompt": f"what is {number} and {row}", "response": f"it is {row}"} for row in range(ROWS_PER_SITE)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"site{number}"] = path
    return files


@contextmanager
def _peaks(run: Deployment) -> Iterator[dict[str, int]]:
    """The largest VmHWM of each kind of process, looked at twice a second."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for process in psutil.process_iter():
                with suppress(psutil.Error, OSError, ValueError, IndexError):
                    kind = _kind(process, run)
                    if kind is not None:
                        text = Path(f"/proc/{process.pid}/status").read_text()
                        peak = 1024 * int(text.split("VmHWM:")[1].split()[0])
                        peaks[kind] = max(peaks.get(kind, 0), peak)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def _kind(process: psutil.Process, run: Deployment) -> str | None:
    command = " ".join(process.cmdline())
    if process.environ().get("FLWR_HOME") != str(run.root / "home"):
        return None
    if "sfedlora.flower.trainer" in command:
        return "trainer"
    return next((kind for word, kind in KINDS.items() if word in command), None)


def _show(one: Measured) -> None:
    setting = one.setting
    peaks = ", ".join(f"{kind} {peak / 1e6:.0f} MB" for kind, peak in sorted(one.peak_bytes.items()))
    message = one.bytes_up / setting.num_nodes
    total_up, total_down = one.bytes_up / 1e6, one.bytes_down / 1e6
    print(
        f"{setting.num_nodes} nodes, {setting.megabytes:g} MB, trainer {setting.trainer}: {one.round_seconds:.1f} s a "
        f"round, up {total_up:.2f} MB, down {total_down:.2f} MB; {peaks}; server app bar "
        f"{(7 * message + 5e8) / 1e6:.0f} MB; base model loads {one.model_loads}",
        flush=True,
    )


if __name__ == "__main__":
    main()
