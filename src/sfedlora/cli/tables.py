"""Tables and lines about finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

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
    print_line(f"adapters: {result.run_dir / 'adapters'} (load with peft.PeftModel.from_pretrained)", console)


def print_comparison(lines: Sequence[Mapping[str, Any]]) -> None:
    """One row per cell of a comparison: settings that differ, then metrics on test of the last and the best round."""
    settings = [line["settings"] for line in lines]
    varying = [key for key in settings[0] if len({str(item.get(key)) for item in settings}) > 1]
    names = _metric_names(lines[0]["summary"]["last"]["test"]["weighted"])
    table = Table("cell", *(key for key in varying), *(f"{n} last" for n in names), *(f"{n} best" for n in names))
    for line in lines:
        row = [_shown(line["settings"].get(key)) for key in varying]
        for which in ("last", "best"):
            row += _numbers(line["summary"][which]["test"]["weighted"])
        table.add_row(line["cell"], *row)
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


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
