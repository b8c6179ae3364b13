"""`sfedlora init`: a commented first configuration, from flags or by asking."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sfedlora.errors import ConfigError

__all__ = ["init"]

EXAMPLE_MODEL, EXAMPLE_DATA = "package:sfedlora/assets/tiny_llama", "package:sfedlora/assets/tiny_chat.jsonl"


class TaskName(StrEnum):
    """What `--task` takes."""

    causal_lm = "causal-lm"
    sequence_classification = "sequence-classification"


def init(  # noqa: PLR0917 - typer turns every argument into an option
    path: Annotated[Path, typer.Argument(metavar="[CONFIG]", help="File to write.")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id, directory, GGUF file or package:NAME/path.")] = None,
    data: Annotated[str | None, typer.Option(help="File, directory, hub id or package:NAME/path.")] = None,
    task: Annotated[TaskName | None, typer.Option(help="causal-lm if not given.")] = None,
    clients: Annotated[int | None, typer.Option(min=2, help="Deal the rows to so many clients at random.")] = None,
    column: Annotated[str | None, typer.Option(help="Or make one client of every value of this column.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    output: Annotated[str, typer.Option(help="Run directory.")] = "runs/first",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a first configuration in which every key has its place, default and meaning.

    What is not given is asked for, on a terminal; elsewhere it is the example of the package.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path}: already exists; choose another name or give --force")
    if clients is not None and column is not None:
        raise ConfigError("--clients and --column: give one of them; rows are dealt at random or by a column")
    ask = _asker()
    source = model or ask("Base model (hub id, directory, GGUF file, package:NAME/path)", EXAMPLE_MODEL)
    rows = data or ask("Data (file, directory, hub id, package:NAME/path)", EXAMPLE_DATA)
    kind = task or TaskName(ask("Task (causal-lm, sequence-classification)", "causal-lm"))
    if clients is None and column is None:
        answer = ask("Clients: a number, or the column that names them", "topic" if rows == EXAMPLE_DATA else "8")
        clients, column = (int(answer), None) if answer.isdecimal() else (None, answer)
    chosen: dict[str, Any] = {"preset": "sfed-lora", "model.source": source, "model.task": kind.value}
    chosen |= {"data.source": rows}
    if kind is TaskName.sequence_classification:
        chosen["data.columns"] = {"text": "text", "label": "label"}
    chosen |= {"partition.scheme": "iid", "partition.num_clients": clients}
    if column is not None:
        chosen |= {"partition.scheme": "column", "partition.num_clients": None, "partition.column": column}
    chosen |= {"lora.rank": rank, "rounds.num_rounds": 10, "local.learning_rate": 1e-3, "output": output}
    from sfedlora.config.starter import starter_yaml
    from sfedlora.storage import write_text

    write_text(path, starter_yaml(chosen))
    typer.echo(f"wrote {path}. Next: sfedlora probe {path} (which settings are stable), or sfedlora run {path}")


def _asker() -> Callable[[str, str], str]:
    if not sys.stdin.isatty():
        return lambda _, default: default
    return lambda question, default: str(typer.prompt(question, default=default))
