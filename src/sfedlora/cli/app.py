"""The typer application that the verbs register with, in the groups that `--help` shows."""

from __future__ import annotations

from collections.abc import Callable

import typer

from sfedlora.cli import compare, demo, evaluate, export, init, personalize, probe, report, resume, run

__all__ = ["app"]

app = typer.Typer(
    name="sfedlora",
    help="Federated LoRA fine-tuning that stays stable at any rank and any number of clients.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Begin": (demo.demo, init.init, probe.probe),
    "Run": (run.run, compare.compare, resume.resume),
    "Look at what came out": (report.report, evaluate.evaluate),
    "Use it": (export.export, personalize.personalize),
}
for group, verbs in GROUPS.items():
    for verb in verbs:
        app.command(rich_help_panel=group)(verb)
