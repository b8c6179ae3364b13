"""`sfedlora flower`: the same configuration across organisations, with Flower."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sfedlora.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(help="Run a federation across sites with Flower.", no_args_is_help=True)


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the app.")],
    config: Annotated[Path, typer.Option(help="YAML configuration of the federation.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
) -> None:
    """Write a ready Flower app: app, link and node settings, service units, a proxy, and a README with the commands."""
    from sfedlora.config import RunConfig

    checked = RunConfig.load(config, overrides or [])
    _require_flower()
    from sfedlora.flower.app_files import write_app

    write_app(folder, checked)
    typer.echo(f"written: {folder}; next: sfedlora flower run {folder}")


@app.command("run")
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `sfedlora flower init` wrote.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over run.yaml.")
    ] = None,
    link: Annotated[str, typer.Option(help="A name in home/config.toml: simulation, loopback, sites.")] = "simulation",
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last complete round.")] = False,
) -> None:
    """Run a written app with Flower and follow it: `flwr run`, with an exit code that says how the run ended."""
    _require_flower()
    from sfedlora.flower.launch import launch

    launch(folder, link, overrides or [], resume=resume)


@app.command("test-certificates")
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for certificates and keys.")],
    nodes: Annotated[int, typer.Option(min=1, max=1000, help="Number of node keys.")] = 3,
) -> None:
    """Make a certificate authority for localhost and node keys, to try a deployment on one machine (30 days)."""
    _require_flower()
    from sfedlora.flower.certificates import write_test_certificates

    for path in write_test_certificates(folder, num_nodes=nodes):
        typer.echo(str(path))


@app.command("secure-key")
def secure_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New file for the private key.")],
) -> None:
    """Make a site's key for secure sums: the private half into FILE, for its owner only; prints the public half."""
    _require_flower()
    from sfedlora.flower.secure_keys import write_private_key

    typer.echo(write_private_key(file))


def _require_flower() -> None:
    if find_spec("flwr") is None:
        raise ConfigError("Flower is not installed; pip install 'sfedlora[flower]'")
