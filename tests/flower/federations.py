"""Small federations: the same configuration for a local run and for a server with sites that have a file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flower.local_exchange import LocalExchange, site_of
from sfedlora import RunConfig

TINY = "package:sfedlora/assets/tiny_llama"
CHAT = "package:sfedlora/assets/tiny_chat.jsonl"
TOPICS = ("ai", "conversations", "emotion-1")
LABELS = ("bad", "good")

__all__ = [
    "CHAT",
    "LABELS",
    "TINY",
    "TOPICS",
    "chat_config",
    "chat_files",
    "exchange_of",
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
