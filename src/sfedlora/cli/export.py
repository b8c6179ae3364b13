"""`sfedlora export`: PEFT directories per client, or a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfedlora.cli.evaluate import parse_round
from sfedlora.errors import ConfigError

__all__ = ["export"]


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
    client: Annotated[list[str] | None, typer.Option(help="Only this client; may be given several times.")] = None,
    round: Annotated[str, typer.Option(help="last, best, or the number of a kept round.")] = "last",
    merged: Annotated[bool, typer.Option("--merged", help="One model with the adapter merged in.")] = False,
) -> None:
    """Write stock PEFT directories (all clients and the shared part), or with --merged a plain model."""
    choice = parse_round(round)
    if merged and client is not None and len(client) > 1:
        raise ConfigError("--merged writes one model: give at most one --client (none: the shared part)")
    from sfedlora.results import export_adapters, export_merged

    if merged:
        written = [export_merged(run_dir, target, client=client[0] if client else None, round_choice=choice)]
    else:
        written = export_adapters(run_dir, target, round_choice=choice, clients=client)
    for path in written:
        typer.echo(str(path))
