"""`sfedlora compare`: a grid over any configuration keys, then one table and one set of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sfedlora.cli.progress import drive_all
from sfedlora.cli.report import draw
from sfedlora.cli.tables import print_comparison
from sfedlora.compare import Axis, compare_events, make_cells, method_axis
from sfedlora.config.yaml_file import split_values
from sfedlora.errors import ConfigError

__all__ = ["compare"]


def compare(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of every cell.")
    ] = None,
    vary: Annotated[list[str] | None, typer.Option(help="key=v1,v2,...; may be given several times.")] = None,
    methods: Annotated[str | None, typer.Option(help="Presets or method names, separated by commas.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Short for --vary lora.rank=...")] = None,
    clients: Annotated[str | None, typer.Option(help="Short for --vary partition.num_clients=...")] = None,
    seeds: Annotated[str | None, typer.Option(help="Short for --vary seed=...")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the cells and results.jsonl.")] = Path("runs/compare"),
    figures: Annotated[bool, typer.Option(help="Draw figures at the end (needs the extra `report`).")] = True,
) -> None:
    """Run every combination. Finished cells are skipped when the command is repeated."""
    axes = [method_axis(split_values(methods))] if methods is not None else []
    short = {"lora.rank": ranks, "partition.num_clients": clients, "seed": seeds}
    axes += [Axis.of_key(key, split_values(values)) for key, values in short.items() if values is not None]
    for item in vary or []:
        key, separator, values = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--vary {item!r}: expected key=v1,v2,..., for example lora.rank=8,64")
        axes.append(Axis.of_key(key, split_values(values)))
    if not axes:
        raise ConfigError("nothing to compare: give --vary key=v1,v2 or --methods, --ranks, --clients, --seeds")
    cells = make_cells(config, overrides or [], axes, output)
    for _ in drive_all(compare_events(cells, output)):
        pass
    results = output / "results.jsonl"
    print_comparison([json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()])
    typer.echo(f"results: {results}")
    if figures:
        draw([output])
