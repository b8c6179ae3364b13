"""`sfedlora run`: one federation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb, mlflow or trackio.")] = None,
) -> None:
    """Run one federation. Ctrl-C stops after the client in hand; `sfedlora resume` goes on."""
    from sfedlora.config import RunConfig

    checked = RunConfig.load(config, overrides or [])
    from sfedlora.cli.progress import drive
    from sfedlora.cli.tables import print_run
    from sfedlora.experiment import run_events

    print_run(drive(run_events(checked), track or []))
