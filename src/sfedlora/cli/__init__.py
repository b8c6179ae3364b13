"""The command line: one file per verb, one place that turns errors into messages and exit codes.

Exit codes: 0 done; 2 bad usage or configuration; 3 a run that failed; 130 interrupted, resumable.

A verb imports what it runs when it is called, not at the top: help texts and configuration errors need no torch.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer

import sfedlora
from sfedlora.errors import InputError, Interrupted, SfedLoraError

__all__ = ["main"]

EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED = 2, 3, 130
_PACKAGE = Path(sfedlora.__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script `sfedlora`; always ends with `SystemExit`.

    Args:
        arguments: the command line after the program's name; None takes this process's.
    """
    from sfedlora.cli.app import app

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of GPU kernels at import
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            sys.exit(app(args=arguments, standalone_mode=True))
        except Interrupted as stop:
            _say(str(stop))
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
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(_PACKAGE):
        _say(f"warning: {message}")
