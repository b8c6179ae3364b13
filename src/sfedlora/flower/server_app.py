"""The app that Flower runs at the server.

What it needs is imported when it runs: client processes import this module too, once per message.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sfedlora.errors import SfedLoraError
from sfedlora.flower.exchange import GridExchange

__all__ = ["make_server_app"]

M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def make_server_app(config_path: Path) -> ServerApp:
    """The server app of a configuration file that lies beside the app."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from sfedlora.flower.server import serve
        from sfedlora.flower.settings import app_config

        _give_back_large_blocks()
        try:
            config = app_config(config_path, context.run_config)
            serve(config, GridExchange(grid), resume=bool(context.run_config.get("resume", False)), log=_say)
        except SfedLoraError as error:
            _say(f"failed: {error}")
            raise

    return app


def _give_back_large_blocks() -> None:
    """Have the C library return freed blocks of a megabyte or more to the system at once.

    By default glibc raises that limit to 32 MB by itself and keeps what lies between: with messages of 50 MB a server
    held 100 MB that nobody used.
    """
    with suppress(OSError, AttributeError):  # another C library has no such limit
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _say(text: str) -> None:
    print(f"{datetime.now(tz=UTC):%H:%M:%S} sfedlora: {text}", flush=True)
