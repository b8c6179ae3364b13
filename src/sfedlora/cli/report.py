"""`sfedlora report`: figures of finished or running experiments."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["draw", "draw_if_possible", "report"]


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run or comparison directories.")],
    output: Annotated[Path | None, typer.Option(help="Where figures over several runs go.")] = None,
) -> None:
    """Draw PNG figures: per round, against rank, against the number of clients."""
    draw(run_dirs, output)


def draw(directories: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Draw the figures of run directories, or of a comparison with results.jsonl, and print their paths."""
    from sfedlora.report import draw_directories

    figures = draw_directories(directories, output)
    for path in figures:
        typer.echo(f"figure: {path}")
    return figures


def draw_if_possible(directory: Path) -> None:
    """Draw the figures of a comparison that has just finished; without matplotlib, say how to get them."""
    if find_spec("matplotlib") is None:
        typer.echo(f"no figures: pip install 'sfedlora[report]', then sfedlora report {directory}", err=True)
        return
    draw([directory])
