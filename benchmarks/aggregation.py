"""What a server step costs: the streaming mean beside memcpy, the thin SVD beside a dense one, every method's seconds.

    python benchmarks/aggregation.py                                      # everything; about 5 minutes on 2 cores
    python benchmarks/aggregation.py --parts mean svd --threads 1 --json aggregation.json

- mean: `weighted_mean` of 20 clients with rank 16 on q and v (4096 wide) of 32 layers, float32, 671 MB in all, against
  copying the same bytes into one reused buffer of one client's size; once with one copy a client, once with one a
  factor. Bytes counted are those read from the clients.
- memory of the mean: its peak over 4 and over 64 such clients that are made one at a time.
- svd: `truncated_svd` of the stacked factors of 20 clients, 2048 x 2048 and rank 16, against a dense SVD of their mean.
- methods: `aggregate` of those 20 clients for every method, three rounds in a row, each round's seconds and its peak
  of memory above what was there before (updates and state). The slowest and the largest of the three are printed.

On two threads one copy a client is the harder limit: threads meet once a client, in the mean once a factor.

Speeds are medians over interleaved pairs in alternating order; `fastest fifth` is the same ratio of the means of each
side's fastest fifth, A/A one side against itself. Ratios closer to a bar than the A/A range do not settle it. Each
figure of memory is from a process of its own, the peak that Linux reports for it (VmHWM), reset after the inputs are
there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sfedlora.lora.algebra import weighted_mean
from sfedlora.lora.low_rank import truncated_svd
from sfedlora.methods import METHODS, aggregate, client_weights
from sfedlora.types import AdapterLayout, LoraSize, LoraSizes, ServerState, Target, Update, select_parts

NUM_CLIENTS, RANK, WIDTH, NUM_ROUNDS, SVD_WIDTH = 20, 16, 4096, 3, 2048
LAYOUT = AdapterLayout(
    targets=tuple(
        Target(f"model.layers.{layer}.self_attn.{name}_proj", WIDTH, WIDTH) for layer in range(32) for name in "qv"
    ),
    head={},
)
SHAPES = LAYOUT.shapes(RANK)
CLIENT_SIZE = 2 * RANK * WIDTH * len(LAYOUT.targets)
SIZES = LoraSizes(LoraSize(RANK, 1.0))
PARTS = ("mean", "memory", "svd", "methods")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what is measured.
        figure: what came out, with its unit.
        bar: what is asked for.
        holds: whether the figure meets the bar.
        detail: the figures beside it.
    """

    what: str
    figure: str
    bar: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Pairs:
    """Seconds of one action, another, and the first again, in interleaved rounds."""

    one: tuple[float, ...]
    other: tuple[float, ...]
    again: tuple[float, ...]

    def ratio(self) -> float:
        """Median of other / one."""
        return statistics.median(other / one for one, other in zip(self.one, self.other, strict=True))

    def fastest_fifth(self) -> float:
        """The same of the means of each side's fastest fifth."""
        return _fastest(self.other) / _fastest(self.one)

    def control(self) -> str:
        """A/A: the first action against itself."""
        ratios = sorted(again / one for one, again in zip(self.one, self.again, strict=True))
        return f"A/A {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {len(ratios)} pairs"


def main() -> None:
    """Measure, print the table, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(_child(arguments.child)))
        return
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {arguments.threads} threads, load {load:.2f} at the start", flush=True)
    rows: list[Row] = []
    for part in arguments.parts:
        for row in _measured(part, arguments.pairs, arguments.threads):
            verdict = "holds" if row.holds else "MISSED"
            print(f"{row.what:<36} {row.figure:>17}  bar {row.bar:<8} {verdict:<7} {row.detail}", flush=True)
            rows.append(row)
    if arguments.json:
        setting = {"torch": torch.__version__, "threads": arguments.threads, "load_at_start": load}
        arguments.json.write_text(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def _measured(part: str, pairs: int, threads: int) -> Iterator[Row]:
    if part == "mean":
        yield from _mean_rows(pairs)
    elif part == "memory":
        yield _memory_row(threads)
    elif part == "svd":
        yield _svd_row(pairs)
    else:
        yield from (_method_row(name, threads) for name in METHODS)


def _compare(one: Callable[[], object], other: Callable[[], object], pairs: int) -> Pairs:
    samples = []
    for number in range(pairs + 1):
        first, middle, last = _timed(one), _timed(other), _timed(one)
        samples.append((first, middle, last) if number % 2 else (last, middle, first))
    return Pairs(*zip(*samples[1:], strict=True))  # the first round warms up


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _fastest(times: tuple[float, ...]) -> float:
    return statistics.mean(sorted(times)[: max(1, len(times) // 5)])


def _client(number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The numbers of one client in one piece, and its factors, which are views of it."""
    flat = torch.randn(CLIENT_SIZE, generator=torch.Generator().manual_seed(number))
    pieces = flat.view(-1, RANK * WIDTH)
    return flat, {name: piece.view(shape) for (name, shape), piece in zip(SHAPES.items(), pieces, strict=True)}


def _mean_rows(pairs: int) -> Iterator[Row]:
    clients = [_client(number) for number in range(NUM_CLIENTS)]
    weights = client_weights({f"client {number:02}": 1 + number for number in range(NUM_CLIENTS)}, "examples").values()
    buffer = torch.zeros(CLIENT_SIZE)
    buffers = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def copy_whole() -> None:
        for flat, _ in clients:
            buffer.copy_(flat)

    def copy_factors() -> None:
        for _, factors in clients:
            for name, factor in factors.items():
                buffers[name].copy_(factor)

    def mean() -> None:
        weighted_mean((weight, factors) for weight, (_, factors) in zip(weights, clients, strict=True))

    read_gigabytes = NUM_CLIENTS * CLIENT_SIZE * 4 / 1e9
    for label, copy in [("one copy a client", copy_whole), ("one a factor", copy_factors)]:
        result = _compare(mean, copy, pairs)
        speeds = [read_gigabytes / statistics.median(times) for times in (result.one, result.other)]
        detail = (
            f"{speeds[0]:.1f} against {speeds[1]:.1f} GB/s, fastest fifth {result.fastest_fifth():.2f}, "
            f"{result.control()}"
        )
        yield Row(f"mean / memcpy, {label}", f"{result.ratio():.2f}", ">= 0.8", result.ratio() >= 0.8, detail)


def _svd_row(pairs: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    lefts = [torch.randn(SVD_WIDTH, RANK, generator=generator) / NUM_CLIENTS for _ in range(NUM_CLIENTS)]
    rights = [torch.randn(RANK, SVD_WIDTH, generator=generator) for _ in range(NUM_CLIENTS)]

    def thin() -> Tensor:
        return truncated_svd(torch.cat(lefts, dim=1), torch.cat(rights), RANK).singular

    def dense() -> Tensor:
        mean = torch.zeros(SVD_WIDTH, SVD_WIDTH)
        for left, right in zip(lefts, rights, strict=True):
            mean.addmm_(left, right)
        singular: Tensor = torch.linalg.svd(mean, full_matrices=False).S
        return singular[:RANK]

    result = _compare(thin, dense, pairs)
    error = float(((thin() - dense()) / dense()).abs().max())
    times = f"{1e3 * statistics.median(result.one):.0f} ms against {1e3 * statistics.median(result.other):.0f} ms"
    detail = (
        f"{times}, singular values within {error:.0e}, fastest fifth {result.fastest_fifth():.0f}, {result.control()}"
    )
    return Row("dense SVD / thin SVD", f"{result.ratio():.0f} times", ">= 30", result.ratio() >= 30, detail)


def _memory_row(threads: int) -> Row:
    few, many = (_run_child(f"mean-{count}", threads)[0]["peak_bytes"] / 1e6 for count in (4, 64))
    item = CLIENT_SIZE * 4 / 1e6
    detail = f"64 clients made one at a time; {few:.0f} MB for 4; the accumulator and one client are {2 * item:.0f} MB"
    return Row("peak memory of the mean", f"{many:.0f} MB", "<= 4's", many < few + item / 2, detail)


def _method_row(name: str, threads: int) -> Row:
    rounds = _run_child(name, threads)
    seconds, peak = (max(values[key] for values in rounds) for key in ("seconds", "peak_bytes"))
    each = "; ".join(f"{values['seconds']:.2f} s {values['peak_bytes'] / 1e6:.0f} MB" for values in rounds)
    figure = f"{seconds:.2f} s {peak / 1e6:.0f} MB"
    return Row(f"aggregate, {name}", figure, "30 s 2 GB", seconds < 30 and peak < 2e9, f"by round: {each}")


def _run_child(what: str, threads: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--child", what, "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rounds: list[dict[str, float]] = json.loads(output)
    return rounds


def _child(what: str) -> list[dict[str, float]]:
    if what.startswith("mean-"):
        count = int(what.removeprefix("mean-"))
        return [_observed(lambda: weighted_mean((1 / count, _client(number)[1]) for number in range(count)))[1]]
    method = METHODS[what]()
    tensors = [_client(number)[1] for number in range(NUM_CLIENTS)]
    state = ServerState(round_num=0, shared=_client(NUM_CLIENTS)[1], extra={})
    rounds = []
    for round_num in range(1, NUM_ROUNDS + 1):
        parts = method.shared_parts(round_num)
        updates = [
            Update(f"client {number}", round_num, 1 + number, select_parts(factors, parts))
            for number, factors in enumerate(tensors)
        ]
        state, figures = _observed(partial(aggregate, method, state, updates, weighting="examples", sizes=SIZES))
        rounds.append(figures)
    return rounds


def _observed(action: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """What an action returns, its seconds, and its peak of memory above what is there before, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before could serve the action unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    begin = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begin
    return result, {"seconds": seconds, "peak_bytes": _status_bytes("VmHWM") - before}


def _status_bytes(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux only")
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
