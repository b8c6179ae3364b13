"""`sfedlora compare`: a grid over any configuration keys, then one table and one set of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfedlora.cli.report import draw_if_possible
from sfedlora.errors import ConfigError

if TYPE_CHECKING:
    from sfedlora.config.grid import Axis

__all__ = ["compare"]


def compare(  # noqa: PLR0917 - typer turns every argument into an option
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of every cell.")
    ] = None,
    vary: Annotated[list[str] | None, typer.Option(help="key=v1,v2,...; may be given several times.")] = None,
    methods: Annotated[str | None, typer.Option(help="Presets or method names, separated by commas.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Short for --vary lora.rank=...")] = None,
    clients: Annotated[str | None, typer.Option(help="Short for --vary partition.num_clients=...")] = None,
    seeds: Annotated[str | None, typer.Option(help="Short for --vary seed=...")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the cells and results.jsonl.")] = Path("runs/compare"),
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb, mlflow or trackio.")] = None,
    figures: Annotated[bool, typer.Option(help="Draw figures at the end (needs the extra `report`).")] = True,
) -> None:
    """Run every combination. Finished cells are skipped when the command is repeated."""
    from sfedlora.config.grid import make_cells

    axes = _axes(vary or [], methods, {"lora.rank": ranks, "partition.num_clients": clients, "seed": seeds})
    cells = make_cells(config, overrides or [], axes, output)
    from sfedlora.cli.progress import drive_all
    from sfedlora.cli.tables import print_comparison
    from sfedlora.compare import compare_events

    for _ in drive_all(compare_events(cells, output), track or []):
        pass
    results = output / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    print_comparison([cell.choices for cell in cells], lines)
    typer.echo(f"results: {results}")
    if figures:
        draw_if_possible(output)


def _axes(vary: Sequence[str], methods: str | None, short: Mapping[str, str | None]) -> list[Axis]:
    from sfedlora.config.grid import Axis, method_axis
    from sfedlora.config.yaml_file import split_values

    axes = [method_axis(split_values(methods))] if methods is not None else []
    axes += [Axis.of_key(key, split_values(values)) for key, values in short.items() if values is not None]
    for item in vary:
        key, separator, values = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--vary {item!r}: expected key=v1,v2,..., for example lora.rank=8,64")
        axes.append(Axis.of_key(key.strip(), split_values(values)))
    if not axes:
        raise ConfigError("nothing to compare: give --vary key=v1,v2 or --methods, --ranks, --clients, --seeds")
    return axes
