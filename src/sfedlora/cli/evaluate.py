"""`sfedlora evaluate`: metrics of a run's adapters on any split or on another file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from sfedlora.errors import ConfigError

__all__ = ["evaluate", "parse_round"]


class SplitName(StrEnum):
    """Splits of a client's own data."""

    train = "train"
    validation = "validation"
    test = "test"


def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")],
    split: Annotated[SplitName, typer.Option(help="Split of each client's own data.")] = SplitName.test,
    round: Annotated[str, typer.Option(help="last, best, or the number of a kept round.")] = "last",
    client: Annotated[list[str] | None, typer.Option(help="Only this client; may be given several times.")] = None,
    data: Annotated[str | None, typer.Option(help="Another file with the run's columns, instead of a split.")] = None,
) -> None:
    """Print metrics as JSON, each client served by its own adapter."""
    choice = parse_round(round)
    from sfedlora.results import evaluate_file, evaluate_run
    from sfedlora.storage import to_json

    if data is not None:
        result = evaluate_file(run_dir, data, round_choice=choice, clients=client)
    else:
        result = evaluate_run(run_dir, split=split.value, round_choice=choice, clients=client)
    typer.echo(to_json(result, indent=2))


def parse_round(text: str) -> Literal["last", "best"] | int:
    """The value of `--round`.

    Raises:
        ConfigError: it is none of last, best and a number.
    """
    if text == "last":
        return "last"
    if text == "best":
        return "best"
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ConfigError(f"--round {text!r}: expected last, best or a round number")
    return int(text)
