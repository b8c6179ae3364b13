"""Small federations: the same configuration for a local run and for a server with sites that have a file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flower.local_exchange import LocalExchange, site_of
from sfedlora import RunConfig
from sfedlora.flower.secure_keys import write_private_key
from sfedlora.flower.settings import site_settings
from sfedlora.flower.site import Site

TINY = "package:sfedlora/assets/tiny_llama"
CHAT = "package:sfedlora/assets/tiny_chat.jsonl"
TOPICS = ("ai", "conversations", "emotion-1")
LABELS = ("bad", "good")
LIMIT = 0.05
"""Of every change that enters a secure sum."""

__all__ = [
    "CHAT",
    "LABELS",
    "LIMIT",
    "TINY",
    "TOPICS",
    "chat_config",
    "chat_files",
    "exchange_of",
    "keys_of",
    "secure_config",
    "site_at",
    "small_config",
    "small_files",
]


def chat_config(tmp_path: Path, **overrides: Any) -> RunConfig:
    """Three topics of the packaged chat pairs, three short rounds; `a__b=1` sets the key `a.b`."""
    values: dict[str, Any] = {
        "model": {"source": TINY},
        "data": {"source": CHAT},
        "partition": {"scheme": "column", "column": "topic", "num_clients": 3},
        "lora": {"rank": 4, "alpha": 16},
        "rounds": {"num_rounds": 3},
        "local": {"learning_rate": 2e-3, "local_steps": 2, "batch_size": 4},
        "flower": {"federation_id": "test", "round_deadline_seconds": 60.0, "join_deadline_seconds": 60.0},
        "runner": "serial",
        "threads": 1,
        "output": str(tmp_path / "run"),
    }
    return RunConfig.from_mapping(values).with_values({key.replace("__", "."): one for key, one in overrides.items()})


def chat_files(tmp_path: Path, topics: tuple[str, ...] = TOPICS) -> dict[str, Path]:
    """A file per topic, with its rows in the order of the packaged file."""
    import sfedlora

    rows = (Path(sfedlora.__file__).parent / "assets" / "tiny_chat.jsonl").read_text().splitlines()
    files = {}
    for topic in topics:
        files[topic] = tmp_path / f"{topic}.jsonl"
        files[topic].write_text("\n".join(row for row in rows if json.loads(row)["topic"] == topic) + "\n")
    return files


def exchange_of(config: RunConfig, files: Mapping[str, Path], state_dir: Path) -> LocalExchange:
    """A real site per file, as nodes 1, 2, 3, ..."""
    return LocalExchange(
        {
            number: site_of(config, client_id, path, state_dir / client_id).answer
            for number, (client_id, path) in enumerate(files.items(), start=1)
        }
    )


def small_config(tmp_path: Path, **overrides: Any) -> RunConfig:
    """Two sites, one step a round: a round takes a fraction of a second."""
    given = {"partition__num_clients": 2, "local__local_steps": 1, "local__batch_size": 2, "rounds__num_rounds": 3}
    return chat_config(tmp_path, **{**given, **overrides})


def small_files(tmp_path: Path) -> dict[str, Path]:
    """The first rows of two topics."""
    files = chat_files(tmp_path, TOPICS[:2])
    for path in files.values():
        path.write_text("\n".join(path.read_text().splitlines()[:24]) + "\n")
    return files


def secure_config(tmp_path: Path, **overrides: Any) -> RunConfig:
    """Three sites, two short rounds."""
    given = {
        "rounds__num_rounds": 2,
        "local__local_steps": 2,
        "local__batch_size": 2,
        "flower__sites": list(TOPICS),
        "flower__min_replies": 3,
        "flower__secure_sum": True,
        "flower__secure_limit": LIMIT,
    }
    values = {**given, **overrides}
    first = {key: values.pop(key) for key in list(values) if key.startswith("flower__")}
    config = chat_config(tmp_path, **values)
    return config.with_values({key.replace("__", "."): one for key, one in first.items()})


def keys_of(folder: Path, sites: tuple[str, ...] = TOPICS) -> dict[str, dict[str, str]]:
    """A private key for each site, and the file of public keys that each has: client id -> node settings."""
    folder.mkdir(exist_ok=True)
    public = {site: write_private_key(folder / f"{site}.key") for site in sites}
    (folder / "public.json").write_text(json.dumps(public))
    return {
        site: {"secure-key": str(folder / f"{site}.key"), "secure-public-keys": str(folder / "public.json")}
        for site in sites
    }


def site_at(config: RunConfig, client_id: str, path: Path, state_dir: Path, keys: dict[str, str]) -> Site:
    node = {"client-id": client_id, "data": str(path), "state-dir": str(state_dir), **keys}
    return Site(site_settings(config, node))
