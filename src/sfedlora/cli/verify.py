"""`sfedlora verify`: recompute a round and compare it, bit for bit, with what the run recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["verify"]

EXIT_DIFFERENT = 3


def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")],
    round: Annotated[
        int | None, typer.Option(min=1, max=999_999_999, help="A kept round; without it, the last possible one.")
    ] = None,
) -> None:
    """Recompute a round from the checkpoint before it: exit code 0 if it is equal, 3 with the first difference."""
    from sfedlora.verify import verify_round

    verdict = verify_round(run_dir, round)
    if verdict.difference is None:
        compared = f"{verdict.num_tensors} tensors and {verdict.num_metrics} metrics"
        typer.echo(f"round {verdict.round_num} of {run_dir}: equal bit for bit ({compared} compared)")
        return
    there = verdict.difference
    typer.echo(f"round {verdict.round_num} of {run_dir}: different: {there.where}")
    typer.echo(f"  expected {there.expected}")
    typer.echo(f"  found    {there.found}")
    raise typer.Exit(EXIT_DIFFERENT)
