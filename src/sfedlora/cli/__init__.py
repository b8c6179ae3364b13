"""The command line: one file per verb, one place that turns errors into messages and exit codes.

Exit codes: 0 done; 2 bad usage or configuration; 3 a run that failed; 130 interrupted, resumable.
"""

from __future__ import annotations

import logging
import sys
import warnings

import typer

from sfedlora.errors import InputError, Interrupted, SfedLoraError

__all__ = ["main"]

EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED = 2, 3, 130


def main() -> None:
    """Entry point of the console script `sfedlora`."""
    from sfedlora.cli.app import app

    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of GPU kernels at import
    try:
        app(standalone_mode=True)
    except Interrupted as stop:
        _say(str(stop))
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _say("stopped at once; a run goes on from its last complete round with `sfedlora resume RUN_DIR`")
        sys.exit(EXIT_INTERRUPTED)
    except InputError as error:
        _say(f"error: {error}")
        sys.exit(EXIT_INPUT)
    except SfedLoraError as error:
        _say(f"run failed: {error}")
        sys.exit(EXIT_RUN)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Our own warnings as plain lines; those of libraries stay out of the way."""
    del lineno
    if issubclass(category, UserWarning) and "sfedlora" in filename:
        _say(f"warning: {message}")
