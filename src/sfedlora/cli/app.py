"""The typer application that the verbs register with."""

from __future__ import annotations

import typer

from sfedlora.cli import compare, demo, evaluate, export, flower, probe, report, resume, run, verify

__all__ = ["app"]

app = typer.Typer(
    name="sfedlora",
    help="Federated LoRA fine-tuning that stays stable at any rank and any number of clients.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run.run)
app.command()(compare.compare)
app.command()(resume.resume)
app.command()(probe.probe)
app.command()(report.report)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(verify.verify)
app.command()(demo.demo)
app.add_typer(flower.app, name="flower")
