"""The app that Flower runs at the server.

What it needs is imported when it runs: client processes import this module too, once per message.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sfedlora.errors import SfedLoraError
from sfedlora.flower.exchange import GridExchange

__all__ = ["make_server_app"]


def make_server_app(config_path: Path) -> ServerApp:
    """The server app of a configuration file that lies beside the app."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from sfedlora.flower.server import serve
        from sfedlora.flower.settings import app_config

        try:
            config = app_config(config_path, context.run_config)
            serve(config, GridExchange(grid), resume=bool(context.run_config.get("resume", False)), log=_say)
        except SfedLoraError as error:
            _say(f"failed: {error}")
            raise

    return app


def _say(text: str) -> None:
    print(f"{datetime.now(tz=UTC):%H:%M:%S} sfedlora: {text}", flush=True)
