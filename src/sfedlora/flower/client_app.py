"""The app that Flower runs at a site: records in, records out.

Flower starts a process for each message. It hands the message to the site's trainer, which keeps the base model, or
does the work itself (`trainer="none"` in the node's settings, and in simulations).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sfedlora.errors import SfedLoraError
from sfedlora.flower.envelope import Envelope, MessageError, failure
from sfedlora.flower.records import from_records, to_records

if TYPE_CHECKING:
    from sfedlora.flower.site import Site

__all__ = ["make_client_app"]


def make_client_app(config_path: Path) -> ClientApp:
    """The client app of a configuration file that lies beside the app."""
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        return _reply(message, context, config_path)

    @app.train()
    def round(message: Message, context: Context) -> Message:
        return _reply(message, context, config_path)

    return app


def _reply(message: Message, context: Context, config_path: Path) -> Message:
    return Message(to_records(_answer(message, context, config_path)), reply_to=message)


def _answer(message: Message, context: Context, config_path: Path) -> Envelope:
    node = dict(context.node_config)
    settings = _settings(config_path, node, dict(context.run_config))
    try:
        envelope = from_records(message.content)
        if "client-id" in node and node.get("trainer", "process") != "none":
            from sfedlora.flower.trainer import ask_trainer

            return ask_trainer(settings, envelope)
        return _site(settings).answer(envelope, int(node.get("partition-id", 0)))
    except MessageError as error:
        print(f"sfedlora: {error}", flush=True)
        return failure("message")
    except SfedLoraError as error:
        print(f"sfedlora: {error}", flush=True)
        return failure("settings")
    except Exception:  # Flower would send its text to the server
        print(f"sfedlora: {traceback.format_exc()}", flush=True)
        return failure("internal")


@lru_cache(maxsize=1)
def _site(settings: str) -> Site:
    """The site that this process played last: a simulation's processes play one client after the other."""
    from sfedlora.flower.site import open_site

    return open_site(settings)


def _settings(config_path: Path, node: Mapping[str, object], run: Mapping[str, object]) -> str:
    """What a site depends on, so that a run that is resumed finds the trainer that is there."""
    needed = ("overrides",) if "client-id" in node else ("overrides", "output")
    own = {key: run[key] for key in needed if key in run}
    return json.dumps({"config": str(config_path), "run": own, "node": _without_position(node)}, sort_keys=True)


def _without_position(node: Mapping[str, object]) -> Mapping[str, object]:
    """All nodes of a simulation share their settings, so that a process loads the base model once."""
    if "client-id" in node:
        return node
    return {key: value for key, value in node.items() if key != "partition-id"}
