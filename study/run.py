"""Run the study: `python -m study.run --archive .data/hutto_ICWSM_2014.tar.gz --output study/results`.

Every run goes through `sfedlora compare`'s machinery and leaves one line in PART.jsonl; a run whose line is there is
skipped, one that was begun is continued, so the command can be stopped and repeated. Run directories go to `--work`
and are removed once their line is written. An estimate of the time is printed first.
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study.data import prepare_dialogue, prepare_sentences
from study.definition import CORNERS, MATCHED, SIZES, Planned, Size, config_of, plan
from study.readings import read_study

from sfedlora.artifacts import RunDirectory
from sfedlora.compare import compare_events
from sfedlora.config.flatten import flatten
from sfedlora.config.grid import Cell
from sfedlora.errors import RunError, StorageError
from sfedlora.experiment import RunResult
from sfedlora.personalize import personalize
from sfedlora.setup.environment import library_versions
from sfedlora.storage import to_json, write_text

__all__ = ["best_rate", "estimate_seconds", "run_study"]

PER_ROUND = ("round_num", "train_loss", "eval_loss", "accuracy", "perplexity", "grad_norm_a", "grad_norm_b", "gain")
SETTINGS = (
    "method.name",
    "method.head",
    "lora.scaling",
    "lora.init",
    "lora.rank",
    "lora.alpha",
    "partition.num_clients",
    "rounds.num_rounds",
    "local.local_steps",
    "local.batch_size",
    "local.optimizer",
    "local.learning_rate",
    "local.learning_rate_a_ratio",
    "seed",
)
BASE_SECONDS = {"sentences": 8.0, "dialogue": 10.0}
STEP_SECONDS = {"sentences": 0.065, "dialogue": 0.85}
CLIENT_SECONDS = {"sentences": 0.1, "dialogue": 3.0}
NEW_CLIENT_SECONDS = 10.0
"""Measured on one core of a shared x86 machine: what a run takes besides training, a step, a client's evaluation."""


def best_rate(lines: Sequence[Mapping[str, Any]], task: str) -> float:
    """The learning rate of the sweep with the lowest validation loss after the last round.

    Raises:
        ValueError: the sweep of this task has not been run.
    """
    swept = [line for line in lines if line["part"] == "sweep" and line["task"] == task and not line["failed"]]
    best = min(swept, key=lambda line: line["last"]["validation"]["eval_loss"])
    return float(best["settings"]["local.learning_rate"])


def estimate_seconds(run: Planned, size: Size) -> float:
    """What a run takes, roughly."""
    steps = run.num_clients * size.num_rounds * size.local_steps
    seconds = BASE_SECONDS[run.task] + STEP_SECONDS[run.task] * steps + CLIENT_SECONDS[run.task] * run.num_clients
    return seconds + NEW_CLIENT_SECONDS * len(run.new_clients)


def run_study(
    runs: Sequence[Planned], sizes: Mapping[str, Size], paths: Mapping[str, Mapping[str, str]], output: Path, work: Path
) -> Iterator[Planned]:
    """Do the runs whose lines are missing, in order; yields each one before it begins.

    Args:
        runs: what to run; the sweep of a task comes before what uses its best rate.
        sizes: by task.
        paths: by task, the files that `study.data` wrote.
        output: folder of the lines.
        work: folder of run directories while they are needed.
    """
    output.mkdir(parents=True, exist_ok=True)
    for run in runs:
        lines = read_study(output)
        if any(line["part"] == run.part and line["run"] == run.name for line in lines):
            continue
        yield run
        rate = 1.0 if run.part == "sweep" else best_rate(lines, run.task)
        line = _line(run, sizes[run.task], paths[run.task], rate, work)
        own = [other for other in lines if other["part"] == run.part]
        write_text(output / f"{run.part}.jsonl", "".join(to_json(item) + "\n" for item in [*own, line]))
        shutil.rmtree(work / "run", ignore_errors=True)


def _line(run: Planned, size: Size, paths: Mapping[str, str], rate: float, work: Path) -> dict[str, Any]:
    """Do one run and say what came out; one in which no client is left with finite numbers has failed."""
    folder = work / "run"
    if (folder / "name").is_file() and (folder / "name").read_text(encoding="utf-8") != run.name:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(run.name, encoding="utf-8")
    cell = Cell(run.name, config_of(run, size, paths, rate, str(folder / "cell")))
    start = time.process_time()
    failed, new = "", {}
    (folder / "compared").mkdir(exist_ok=True)
    try:
        for event in compare_events([cell], folder / "compared"):
            if isinstance(event, RunResult):
                new = _join_new(run, folder, paths)
    except StorageError:
        raise
    except RunError as error:
        failed = str(error)
    seconds = time.process_time() - start
    return {
        "part": run.part,
        "run": run.name,
        "task": run.task,
        "rule": run.rule.label,
        "failed": failed,
        "rate": run.rate,
        "cpu_seconds": round(seconds, 1),
        **_outcome(folder / "cell"),
        **({"new_clients": new} if new else {}),
    }


def _outcome(path: Path) -> dict[str, Any]:
    """What the figures need of a run directory, finished or not."""
    directory = RunDirectory.open(path)
    settings = flatten(directory.settings())
    summary = directory.summary() or {}
    rounds = [{key: _short(line[key]) for key in PER_ROUND if key in line} for line in directory.metrics()]
    excluded = [len(line["excluded"]) for line in directory.metrics()]
    outcome: dict[str, Any] = {
        "settings": {key: settings[key] for key in SETTINGS},
        "gamma": directory.environment()["scaling"]["gamma"],
        "rounds": [{**record, "excluded": count} for record, count in zip(rounds, excluded, strict=True)],
    }
    for when in ("initial", "last"):
        if when in summary:
            outcome[when] = {
                split: {key: _short(value) for key, value in summary[when][split]["weighted"].items()}
                for split in ("validation", "test")
            }
    if "last" in summary:
        clients = summary["last"]["test"]["clients"]
        outcome["client_test_losses"] = {key: _short(value["eval_loss"]) for key, value in clients.items()}
    return outcome


def _join_new(run: Planned, folder: Path, paths: Mapping[str, str]) -> dict[str, Any]:
    """What clients get that took no part: test metrics of the untouched model, alone, and with the shared A."""
    joined: dict[str, Any] = {}
    for name in run.new_clients:
        rows: dict[str, Any] = {}
        for label, train_a in (("personalized", False), ("personalized, A trained", True)):
            target = folder / f"{name}-{train_a}"
            found = personalize(folder / "cell", paths[f"new-{name}"], target, client_id=f"new-{name}", train_a=train_a)
            rows |= {key: value["test"] for key, value in found.rows.items() if key != "personalized"}
            rows[label] = found.rows["personalized"]["test"]
        joined[name] = {key: {k: _short(v) for k, v in value.items()} for key, value in rows.items()}
    return joined


def _short(value: Any) -> Any:
    """Six digits; None for what is not finite, which JSON has no number for."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def main() -> None:
    """Prepare the data, print the estimate, run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--archive", type=Path, default=Path(".data/hutto_ICWSM_2014.tar.gz"))
    parser.add_argument("--output", type=Path, default=Path("study/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--parts", default="", help="Only these, separated by commas; a sweep comes before its task.")
    parser.add_argument("--hours", type=float, default=2.5, help="Begin no further run after so many.")
    arguments = parser.parse_args()
    begin = time.monotonic()
    parts = {name for name in arguments.parts.split(",") if name}
    runs = [run for run in plan() if not parts or run.part in parts]
    done = {(line["part"], line["run"]) for line in read_study(arguments.output)}
    left = [run for run in runs if (run.part, run.name) not in done]
    seconds = sum(estimate_seconds(run, SIZES[run.task]) for run in left)
    print(f"{len(left)} of {len(runs)} runs to do, roughly {seconds / 60:.0f} minutes on one core", flush=True)
    data = arguments.work / "data"
    paths = {
        "sentences": prepare_sentences(arguments.archive, data / "sentences"),
        "dialogue": prepare_dialogue(data / "dialogue", sorted({count for _, count in (MATCHED, *CORNERS)})),
    }
    facts = {"machine": platform.machine(), "threads": 1, "versions": library_versions()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output / "environment.json", to_json(facts) + "\n")
    for run in run_study(left, SIZES, paths, arguments.output, arguments.work):
        minutes = (time.monotonic() - begin) / 60
        if minutes > 60 * arguments.hours:
            print(f"stopped after {minutes:.0f} minutes; the same command goes on", flush=True)
            return
        print(f"{minutes:6.1f} min  {run.part}: {run.name}", flush=True)


if __name__ == "__main__":
    main()
