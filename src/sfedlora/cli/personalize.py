"""`sfedlora personalize`: a new client joins a finished federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

__all__ = ["personalize"]


def personalize(  # noqa: PLR0917 - typer turns every argument into an option
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Finished run directory.")],
    data: Annotated[str, typer.Option(help="The new client's file, with the run's columns.")],
    output: Annotated[Path, typer.Option(help="New folder for its PEFT adapter.")] = Path("personal"),
    client: Annotated[str, typer.Option(help="Name of the client; enters its seeds.")] = "new",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; as in the whole run if not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="The run's if not given.")] = None,
    train_a: Annotated[bool, typer.Option("--train-a", help="Train the shared A further, not B alone.")] = False,
) -> None:
    """Train a new client's own B on the shared A and compare with LoRA of its own and the untouched model."""
    from sfedlora.cli.tables import output_console, print_line
    from sfedlora.personalize import personalize as join

    result = join(
        run_dir, data, output, client_id=client, num_steps=steps, learning_rate=learning_rate, train_a=train_a
    )
    names = list(result.rows["untouched"]["test"])
    columns = [f"{split} {name.removeprefix('eval_')}" for split in ("validation", "test") for name in names]
    table = Table("", *columns)
    for row, splits in result.rows.items():
        table.add_row(row, *(f"{splits[split][name]:.4g}" for split in ("validation", "test") for name in names))
    console = output_console()
    console.print(table)
    counts = ", ".join(f"{count} {split}" for split, count in result.num_examples.items())
    print_line(f"client {client}: {counts} examples, {result.num_steps} steps each for local-only and personalized")
    print_line(f"adapter: {result.adapter} (load with peft.PeftModel.from_pretrained)")
