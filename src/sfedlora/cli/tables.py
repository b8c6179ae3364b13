"""Tables and lines about finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from sfedlora.experiment import RunResult

__all__ = ["output_console", "print_comparison", "print_line", "print_run"]

PIPE_WIDTH = 120


def output_console() -> Console:
    """Standard output: as wide as the terminal, and in a pipe or file wide enough that no cell is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def print_run(result: RunResult) -> None:
    """Initial, last and best metrics of a run, and what to do next."""
    table = Table("", "round", "split", *_metric_names(result.summary["last"]["test"]["weighted"]))
    for name in ("initial", "last", "best"):
        entry = result.summary[name]
        for split in ("validation", "test"):
            values = _numbers(entry[split]["weighted"])
            table.add_row(name, str(entry.get("round_num", 0)), split, *values)
    console = output_console()
    console.print(table)
    print_line("best is chosen on validation; means over clients weighted by their examples", console)
    print_line(f"run directory: {result.run_dir}", console)
    print_line(f"clients' state on disk: {result.summary['store_bytes'] / 1e6:.2f} MB", console)
    print_line(f"adapters: {result.run_dir / 'adapters'} (load with peft.PeftModel.from_pretrained)", console)
    for verb, purpose in (
        (f"report {result.run_dir}", "a page with charts, clients and costs"),
        (f"evaluate {result.run_dir}", "every client on its test split"),
        (f"export {result.run_dir} TARGET", "adapters of the last or the best round, or a merged model"),
    ):
        print_line(f"next: sfedlora {verb}  ({purpose})", console)


def print_comparison(choices: Sequence[Mapping[str, str]], lines: Sequence[Mapping[str, Any]]) -> None:
    """One row per cell of a comparison: what was varied, then metrics on test of the last and the best round.

    Args:
        choices: of every cell, the name and the value of each varied setting.
        lines: of every cell, in the same order, its line of results.jsonl.
    """
    names = _metric_names(lines[0]["summary"]["last"]["test"]["weighted"])
    table = Table(
        *(Column(name, overflow="fold") for name in choices[0]),
        *(Column(f"{name}\n{which}", justify="right", no_wrap=True) for which in ("last", "best") for name in names),
    )
    for chosen, line in zip(choices, lines, strict=True):
        metrics = (line["summary"][which]["test"]["weighted"] for which in ("last", "best"))
        table.add_row(*chosen.values(), *(_aligned(value) for values in metrics for value in values.values()))
    console = output_console()
    console.print(table)
    print_line("metrics on the clients' test splits, weighted by examples; best is chosen on validation", console)


def print_line(text: str, console: Console | None = None) -> None:
    """One plain line on standard output."""
    (console or output_console()).print(text, markup=False, highlight=False, soft_wrap=True)


def _metric_names(metrics: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix("eval_") for name in metrics]


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    return [_shown(value) for value in metrics.values()]


def _aligned(value: Any) -> str:
    """A metric with as many digits as its neighbours."""
    return f"{value:#.5g}" if isinstance(value, float) else _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
