"""The app that Flower runs at a site: settings of the node, records in, records out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError, SfedLoraError
from sfedlora.flower.protocol import Envelope, Failure, MessageError, config_digest, seal
from sfedlora.flower.records import from_records, to_records
from sfedlora.flower.site import Site, SiteSettings
from sfedlora.flower.trainer import ask_trainer

__all__ = ["app_config", "make_client_app", "site_settings"]

_KEYS = ("client-id", "columns", "data", "device", "model", "state-dir", "trainer")
_SIMULATION_KEYS = ("partition-id", "num-partitions")


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


def app_config(config_path: Path, run_config: Mapping[str, Any]) -> RunConfig:
    """The federation's configuration: the file, then `overrides` and `output` of the run.

    Raises:
        ConfigError: one message that names the key.
    """
    overrides = shlex.split(str(run_config.get("overrides", "")))
    output = str(run_config.get("output", ""))
    return RunConfig.load(config_path, [*overrides, *([f"output={output}"] if output else [])])


def site_settings(config: RunConfig, node_config: Mapping[str, Any]) -> SiteSettings:
    """The settings of a site, from the configuration and what its node was started with (`--node-config`).

    Raises:
        ConfigError: a key is unknown or missing.
    """
    digest = config_digest(config)
    unknown = sorted(node_config.keys() - {*_KEYS, *_SIMULATION_KEYS})
    if unknown:
        raise ConfigError(f"node config: unknown key {unknown[0]!r}; known keys: {', '.join(_KEYS)}")
    if "client-id" not in node_config and "partition-id" in node_config:
        return SiteSettings(config, digest, None, Path(f"{config.output}-sites"))
    for key in ("client-id", "data", "state-dir"):
        if not node_config.get(key):
            raise ConfigError(f"node config: {key} is missing; start the node with --node-config '{key}=\"...\" ...'")
    own: dict[str, Any] = {"data.source": str(node_config["data"])}
    if "columns" in node_config:
        own["data.columns"] = _columns(str(node_config["columns"]))
    if "model" in node_config:
        own["model.source"] = str(node_config["model"])
    if "device" in node_config:
        own["device"] = str(node_config["device"])
    return SiteSettings(
        config.with_values(own), digest, str(node_config["client-id"]), Path(str(node_config["state-dir"]))
    )


def _reply(message: Message, context: Context, config_path: Path) -> Message:
    return Message(to_records(_answer(message, context, config_path)), reply_to=message)


def _answer(message: Message, context: Context, config_path: Path) -> Envelope:
    try:
        envelope = from_records(message.content)
        config = app_config(config_path, context.run_config)
        settings = site_settings(config, context.node_config)
    except MessageError as error:
        print(f"sfedlora: {error}", flush=True)
        return seal(Failure(code="message"))
    except SfedLoraError as error:
        print(f"sfedlora: {error}", flush=True)
        return seal(Failure(code="settings"))
    if settings.client_id is not None and config.flower.trainer == "process":
        return ask_trainer(settings, envelope)
    return _site(settings.to_json()).answer(envelope, int(context.node_config.get("partition-id", 0)))


@lru_cache(maxsize=1)
def _site(settings: str) -> Site:
    """The site that this process played last: a simulation's processes play one client after the other."""
    return Site(SiteSettings.from_json(settings))


def _columns(text: str) -> dict[str, str]:
    """`prompt=question,response=answer` as a mapping."""
    pairs = [part.split("=", 1) for part in re.split(r"\s*,\s*", text.strip()) if part]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ConfigError(
            f'node config: columns={text!r}; expected for example columns="prompt=question,response=answer"'
        )
    return {role.strip(): column.strip() for role, column in pairs}
