"""`sfedlora run`: one federation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sfedlora.config import RunConfig

__all__ = ["run"]


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    *,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb, mlflow or trackio.")] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First measure how many clients in one forward pass are fastest, and record it."),
    ] = False,
) -> None:
    """Run one federation. Ctrl-C stops after the client in hand; `sfedlora resume` goes on."""
    from sfedlora.config import RunConfig

    checked = RunConfig.load(config, overrides or [])
    from sfedlora.cli.progress import drive
    from sfedlora.cli.tables import print_run
    from sfedlora.experiment import run_events

    if tune:
        checked = _tuned(checked)
    print_run(drive(run_events(checked), track or []))


def _tuned(config: RunConfig) -> RunConfig:
    """The configuration with the number of clients in a pass that is the fastest here."""
    from sfedlora.artifacts import RunDirectory
    from sfedlora.setup.tune import tune

    RunDirectory.check_free(Path(config.output))  # before minutes of measuring
    tuned = tune(config)
    for item in tuned.measured:
        seconds = item.seconds_per_token
        found = "does not fit into memory" if seconds is None else f"{1e6 * seconds:.4g} us per token"
        typer.echo(f"clients_per_batch {item.clients_per_batch}: {found}", err=True)
    typer.echo(f"taken: runner {tuned.config.runner}, clients_per_batch {tuned.config.clients_per_batch}", err=True)
    return tuned.config
