"""`sfedlora demo`: what the scaling does at a high rank and more clients, on real weights and real text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from sfedlora.cli.report import draw_if_possible
from sfedlora.cli.tables import output_console, print_line
from sfedlora.demo import (
    DEMO_CLIENTS,
    DEMO_RANK,
    MATCHED_CLIENTS,
    MATCHED_GAMMA,
    MATCHED_RANK,
    SAFETY_FACTOR,
    TASKS,
    conclusion,
    demo_cells,
    loss_drop,
    prepare_data,
    recorded_sweep,
)
from sfedlora.errors import ConfigError

__all__ = ["demo"]


class TaskChoice(StrEnum):
    """What `--task` takes."""

    chat = "chat"
    sentiment = "sentiment"


def demo(
    task: Annotated[
        TaskChoice | None, typer.Option(help="chat (if not given): SmolLM2-135M. sentiment: MiniLM-L6.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Chat on the tiny model of the package, in a minute.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder; runs/demo-TASK if not given.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with downloaded data (sentiment).")] = None,
) -> None:
    """Run the embedded demonstration, print its table and its conclusion. No network is used."""
    from sfedlora.cli.progress import drive_all
    from sfedlora.compare import compare_events, require_comparison_folder

    begin = time.monotonic()
    if quick and task is TaskChoice.sentiment:
        raise ConfigError("--quick is a chat task on the packaged tiny model; give --quick or --task sentiment")
    chosen = TASKS["quick" if quick else (task or TaskChoice.chat).value]
    folder = output if output is not None else Path("runs") / f"demo-{chosen.name}"
    require_comparison_folder(folder)
    data = prepare_data(chosen, folder, DEMO_CLIENTS, data_dir)
    cells = demo_cells(chosen, data, folder)
    for _ in drive_all(compare_events(cells, folder)):
        pass
    results = folder / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    _print_setting(recorded_sweep(chosen.name), lines)
    _print_table(lines)
    print_line(conclusion(lines))
    if chosen.model_task == "causal-lm":
        _print_answer(Path(lines[0]["run_dir"]))
    print_line(f"results: {results}")
    draw_if_possible(folder)
    print_line(f"the demonstration took {time.monotonic() - begin:.0f} s")


def _print_setting(sweep: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    settings = lines[0]["settings"]
    print_line(
        f"All rules have gamma {MATCHED_GAMMA:g} at rank {MATCHED_RANK} with {MATCHED_CLIENTS} clients. There a sweep "
        f"({sweep['command']}; recorded in assets/demo_sweep.json) found learning rate {sweep['best_learning_rate']:g} "
        f"best; here alpha is kept and the rate is 1/{SAFETY_FACTOR:g} of it, {settings['local.learning_rate']:g}, "
        f"at rank {DEMO_RANK} with {DEMO_CLIENTS} clients: {settings['rounds.num_rounds']} rounds of "
        f"{sweep['local_steps']} {settings['local.optimizer']} steps."
    )


def _print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    has_accuracy = "accuracy" in lines[0]["summary"]["last"]["test"]["weighted"]
    columns = ["row", "init", "optimizer", "gamma", "test loss", "loss drop"]
    table = Table(*columns, *(["accuracy"] if has_accuracy else []), box=box.SIMPLE)
    start = lines[0]["summary"]["initial"]["test"]["weighted"]
    table.add_row("untouched", "-", "-", "-", *_metrics(start, None, has_accuracy))
    for line in lines:
        settings = line["settings"]
        table.add_row(
            line["cell"],
            settings["lora.init"],
            settings["local.optimizer"],
            f"{settings['gamma']:.4g}",
            *_metrics(line["summary"]["last"]["test"]["weighted"], loss_drop(line), has_accuracy),
        )
    output_console().print(table)


def _metrics(metrics: Mapping[str, Any], drop: float | None, has_accuracy: bool) -> list[str]:
    cells = [f"{metrics['eval_loss']:.4f}", "-" if drop is None else f"{drop:+.1%}"]
    return [*cells, f"{metrics['accuracy']:.3f}"] if has_accuracy else cells


def _print_answer(run_dir: Path) -> None:
    from sfedlora.generate import answer_before_and_after

    answer = answer_before_and_after(run_dir)
    print_line(f"prompt (client {answer.client_id}): {answer.prompt}")
    print_line(f"  reference: {answer.reference}")
    print_line(f"  before:    {answer.before}")
    print_line(f"  after:     {answer.after}")
