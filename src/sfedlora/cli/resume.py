"""`sfedlora resume`: go on after a stop or a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["resume"]


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")],
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb, mlflow or trackio.")] = None,
) -> None:
    """Go on after the last complete round, to the same bits as an uninterrupted run."""
    from sfedlora.cli.progress import drive
    from sfedlora.cli.tables import print_run
    from sfedlora.experiment import resume_events

    print_run(drive(resume_events(run_dir), track or []))
