"""The typer application that the verbs register with, in the groups that `--help` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import typer

from sfedlora.cli import compare, demo, evaluate, export, flower, init, personalize, probe, report, resume, run, verify

__all__ = ["app"]

app = typer.Typer(
    name="sfedlora",
    help="Federated LoRA fine-tuning that stays stable at any rank and any number of clients.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
GROUPS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "Begin": (demo.demo, init.init, probe.probe),
    "Run": (run.run, compare.compare, resume.resume),
    "Look at what came out": (report.report, evaluate.evaluate, verify.verify),
    "Use it": (export.export, personalize.personalize),
}
for group, verbs in GROUPS.items():
    for verb in verbs:
        app.command(rich_help_panel=group)(verb)
app.add_typer(flower.app, name="flower", rich_help_panel="Across organisations")
