"""`sfedlora probe`: a stability check before the long run."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sfedlora.errors import ConfigError

__all__ = ["probe"]


def probe(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks of the grid, at the largest number of clients.")] = "4,32,256",
    clients: Annotated[
        str, typer.Option(help="Numbers of clients, at the middle rank; all divide the largest.")
    ] = "2,4,8",
    output: Annotated[Path, typer.Option(help="Folder for probe.json and probe.png.")] = Path("runs/probe"),
) -> None:
    """Measure in minutes which scaling is stable for this model and data, and which learning rates are safe."""
    from sfedlora.config import RunConfig

    plan_ranks, plan_clients = _numbers("--ranks", ranks), _numbers("--clients", clients)
    checked = RunConfig.load(config, overrides or [])
    from sfedlora.cli.tables import print_line
    from sfedlora.probe import Measurements, Plan, draw_probe, judge, probe_events
    from sfedlora.storage import make_directory, write_json

    make_directory(output)
    measured: Measurements | None = None
    for event in probe_events(checked, Plan(plan_ranks, plan_clients)):
        if isinstance(event, Measurements):
            measured = event
        else:
            typer.echo(f"{event.done}/{event.total}: {event.what}", err=True)
    if measured is None:
        raise ConfigError("the probe ended without a result")
    verdict = judge(measured)
    for line in verdict.lines:
        print_line(line)
    content = asdict(measured) | {"config": checked.model_dump(mode="json")}
    write_json(output / "probe.json", {"verdict": asdict(verdict), "measured": content})
    print_line(f"measured in {measured.seconds:.0f} s: {output / 'probe.json'}")
    if find_spec("matplotlib") is None:
        typer.echo("no figure: pip install 'sfedlora[report]'", err=True)
    elif (figure := draw_probe(measured, output / "probe.png")) is not None:
        print_line(f"figure: {figure}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= 6 for part in parts):
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, for example 2,4,8")
    return tuple(dict.fromkeys(map(int, parts)))
