"""`sfedlora report`: a page and figures of finished or running experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sfedlora.errors import ConfigError

__all__ = ["draw", "draw_if_possible", "report"]

NEEDED = ("matplotlib", "plotly")


def report(  # noqa: PLR0917 - typer turns every argument into an option
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run or comparison directories.")],
    output: Annotated[Path | None, typer.Option(help="Where page and figures over several runs go.")] = None,
    figures: Annotated[bool, typer.Option(help="Draw PNG figures, too.")] = True,
    samples: Annotated[
        int,
        typer.Option(min=0, max=20, help="Answers of so many clients, before and after (causal-lm; loads the model)."),
    ] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Serve a live page to this machine until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --watch; 0 takes one that is free.")] = 0,
) -> None:
    """Write report.html, which opens offline, and PNG figures; or watch a run that goes on."""
    if watch:
        if len(run_dirs) != 1 or samples or output is not None:
            raise ConfigError("--watch takes one directory, and neither --output nor --samples")
        _serve(run_dirs[0], port)
        return
    draw(run_dirs, output, figures=figures, samples=samples)


def draw(directories: Sequence[Path], output: Path | None = None, *, figures: bool = True, samples: int = 0) -> None:
    """Write pages and figures of run directories and comparisons, and print their paths."""
    from sfedlora.report import draw_directories, has_finished_rounds, write_reports

    for path in write_reports(directories, output, _answers(directories, samples)):
        typer.echo(f"report: {path}")
    drawable = [directory for directory in directories if has_finished_rounds(directory)]
    for path in draw_directories(drawable, output) if figures and drawable else ():
        typer.echo(f"figure: {path}")


def draw_if_possible(directory: Path) -> None:
    """Report of a comparison that has just finished; without the extra, say how to get it."""
    if any(find_spec(name) is None for name in NEEDED):
        typer.echo(f"no report: pip install 'sfedlora[report]', then sfedlora report {directory}", err=True)
        return
    draw([directory])


def _answers(directories: Sequence[Path], samples: int) -> Mapping[Path, list[dict[str, str]]]:
    if not samples:
        return {}
    from sfedlora.generate import sample_answers

    runs = [directory for directory in directories if (directory / "config.yaml").is_file()]
    return {
        run: [{**asdict(answer), "client": answer.client_id} for answer in sample_answers(run, samples)] for run in runs
    }


def _serve(directory: Path, port: int) -> None:
    from sfedlora.report.live import make_server, server_address

    server = make_server(directory, port)
    typer.echo(f"watching {directory}: {server_address(server)} (Ctrl-C ends it; the run is not touched)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
