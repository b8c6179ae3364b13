"""The two halves of a federation that Flower runs: one at the server, one at every site. Settings are in run.yaml."""

from pathlib import Path

from sfedlora.flower.client_app import make_client_app
from sfedlora.flower.server_app import make_server_app

__all__ = ["client_app", "server_app"]

CONFIG = Path(__file__).with_name("run.yaml")
server_app = make_server_app(CONFIG)
client_app = make_client_app(CONFIG)
