"""What an app runs with: its configuration file, what `flwr run -c` gives, and what a node was started with."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.flower.protocol import MAX_CLIENT_ID, config_digest
from sfedlora.flower.secure_keys import SiteKeys, read_site_keys

__all__ = ["SiteSettings", "app_config", "site_settings"]

_SECURE_KEYS = ("secure-key", "secure-public-keys")
_KEYS = (
    "client-id",
    "columns",
    "data",
    "device",
    "model",
    *_SECURE_KEYS,
    "state-dir",
    "trainer",
    "trainer-idle-seconds",
)
_TRAINERS = ("process", "none")
_SIMULATION_KEYS = ("partition-id", "num-partitions")


@dataclass(frozen=True)
class SiteSettings:
    """What a site is started with.

    Attributes:
        config: the federation's configuration with the site's own paths, columns and device.
        digest: of the federation's configuration before that.
        client_id: its name; None: it plays all clients of a simulation.
        state_dir: where it keeps what never leaves it.
        keys: for secure sums; None without them.
    """

    config: RunConfig
    digest: str
    client_id: str | None
    state_dir: Path
    keys: SiteKeys | None = None


def app_config(config_path: Path, run_config: Mapping[str, Any]) -> RunConfig:
    """The federation's configuration: the file, then `overrides` and `output` of the run.

    Raises:
        ConfigError: one message that names the key.
    """
    text = str(run_config.get("overrides", ""))
    try:
        overrides = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"overrides={text!r}: {error}; expected for example overrides='seed=1 threads=2'") from None
    config = RunConfig.load(config_path, overrides)
    output = str(run_config.get("output", ""))
    return config.with_values({"output": output}) if output else config


def site_settings(config: RunConfig, node_config: Mapping[str, Any]) -> SiteSettings:
    """The settings of a site, from the configuration and what its node was started with (`--node-config`).

    Raises:
        ConfigError: a key is unknown or missing, or a value cannot be used.
    """
    digest = config_digest(config)
    unknown = sorted(node_config.keys() - {*_KEYS, *_SIMULATION_KEYS})
    if unknown:
        raise ConfigError(f"node config: unknown key {unknown[0]!r}; known keys: {', '.join(_KEYS)}")
    if "client-id" not in node_config and "num-partitions" in node_config:
        if config.flower.secure_sum:
            raise ConfigError(
                "flower.secure_sum: the clients of a simulation have no keys; simulate with overrides="
                "'flower.secure_sum=false flower.secure_limit=null'"
            )
        return SiteSettings(config, digest, None, Path(f"{config.output}-sites"))
    for key in ("client-id", "data", "state-dir"):
        if node_config.get(key) in (None, ""):
            raise ConfigError(f"node config: {key} is missing; start the node with --node-config '{key}=\"...\" ...'")
    client_id = str(node_config["client-id"])
    if not client_id.isprintable() or len(client_id) > MAX_CLIENT_ID:
        raise ConfigError(f"node config: client-id={client_id[:MAX_CLIENT_ID]!r}; expected one line of text, no longer")
    _require_trainer(node_config)
    own: dict[str, Any] = {"data.source": str(node_config["data"])}
    if "columns" in node_config:
        own["data.columns"] = _columns(str(node_config["columns"]))
    if "model" in node_config:
        own["model.source"] = str(node_config["model"])
    if "device" in node_config:
        own["device"] = str(node_config["device"])
    keys = _site_keys(config, client_id, node_config) if config.flower.secure_sum else None
    return SiteSettings(config.with_values(own), digest, client_id, Path(str(node_config["state-dir"])), keys)


def _site_keys(config: RunConfig, client_id: str, node_config: Mapping[str, Any]) -> SiteKeys:
    for key in _SECURE_KEYS:
        if node_config.get(key) in (None, ""):
            raise ConfigError(f"node config: {key} is missing, which flower.secure_sum needs; see docs/deployment.md")
    private, public = (Path(str(node_config[key])) for key in _SECURE_KEYS)
    return read_site_keys(client_id, private, public, sites=config.flower.sites or ())


def _require_trainer(node_config: Mapping[str, Any]) -> None:
    trainer, idle = node_config.get("trainer", _TRAINERS[0]), node_config.get("trainer-idle-seconds", 1.0)
    if trainer not in _TRAINERS:
        raise ConfigError(f"node config: trainer={trainer!r}; expected one of {', '.join(_TRAINERS)}")
    if not isinstance(idle, int | float) or isinstance(idle, bool) or not 0.0 < idle < math.inf:
        raise ConfigError(f"node config: trainer-idle-seconds={idle!r}; expected a number of seconds above 0")


def _columns(text: str) -> dict[str, str]:
    """`prompt=question,response=answer` as a mapping."""
    pairs = [part.split("=", 1) for part in re.split(r"\s*,\s*", text.strip()) if part]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ConfigError(
            f'node config: columns={text!r}; expected for example columns="prompt=question,response=answer"'
        )
    return {role.strip(): column.strip() for role, column in pairs}
