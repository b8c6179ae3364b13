"""A federation across two sites for the crash tests: what all lives read, the server's life, and what must be equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flower.federations import TOPICS, small_config, small_files
from flower.local_exchange import Answer, LocalExchange, Node, site_of
from sfedlora import RunConfig
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.exchange import Kind
from sfedlora.flower.server import serve
from sfedlora.setup.server import load_server_model
from sfedlora.setup.site import load_site
from support.sentiment import write_sentiment

__all__ = ["SITES", "Deployment", "files_below", "serve_here", "server_files"]

SITES = TOPICS[:2]


@dataclass(frozen=True)
class Deployment:
    """Two sites and a server.

    Attributes:
        options: of the configuration, `a__b=1` for the key `a.b`.
        sentiment: a classification task with a head, in place of chat.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    sentiment: bool = False

    def prepare(self, shared: Path) -> None:
        """Write model and files, and load once what all lives load; nothing is trained."""
        if self.sentiment:
            path = write_sentiment(shared)
            rows = path.with_name("rows.jsonl").read_text(encoding="utf-8").splitlines()
            for number, client_id in enumerate(SITES):
                (shared / f"{client_id}.jsonl").write_text("\n".join(rows[number::4]) + "\n", encoding="utf-8")
        else:
            small_files(shared)
        config = self.config(shared, shared / "never")
        load_server_model(config)
        for client_id in SITES:
            load_site(config.with_values({"data.source": str(shared / f"{client_id}.jsonl")}), client_id)

    def config(self, shared: Path, output: Path) -> RunConfig:
        """The federation's configuration."""
        waits = dict.fromkeys(("flower__round_deadline_seconds", "flower__join_deadline_seconds"), 3600.0)
        short = {"flower__min_replies": 1, "flower__metrics": "per-client", **waits, **self.options}
        if not self.sentiment:
            return small_config(shared, **short).with_values({"output": str(output)})
        values = yaml.safe_load((shared / "run.yaml").read_text(encoding="utf-8"))
        values["data"]["labels"] = ["negative", "positive"]
        values["partition"]["num_clients"] = len(SITES)
        values |= {"runner": "serial", "flower": {"federation_id": "test"}, "output": str(output)}
        few = {"rounds__num_rounds": 3, "local__local_steps": 2, **short}
        return RunConfig.from_mapping(values).with_values({key.replace("__", "."): one for key, one in few.items()})

    def site(self, shared: Path, client_id: str, state_dir: Path) -> Node:
        """A real site, as it is after a start: it knows what is on its disk."""
        return site_of(
            self.config(shared, shared / "never"), client_id, shared / f"{client_id}.jsonl", state_dir
        ).answer


@dataclass
class _Watched(LocalExchange):
    """An exchange that tells of every message and every answer."""

    boundary: Callable[[], None] = lambda: None

    def push(self, kind: Kind, messages: Mapping[int, Envelope], *, seconds: float) -> dict[int, str]:
        self.boundary()
        return super().push(kind, messages, seconds=seconds)

    def pull(self, message_id: str) -> Answer:
        answer = super().pull(message_id)
        self.boundary()
        return answer


def serve_here(config: RunConfig, nodes: Mapping[int, Node], boundary: Callable[[], None] = lambda: None) -> None:
    """One life of the server in this process: it begins, or goes on with what is in its run directory."""
    resume = Path(config.output, "config.yaml").is_file()
    serve(config, _Watched(dict(nodes), boundary=boundary), resume=resume, log=lambda _: None)


def server_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of a server's run directory, without seconds and without the name of the folder.

    The state of a checkpoint holds the seconds of a round whose line is not written yet. They are taken out, and its
    checksum is replaced by whether it is right.
    """
    content = files_below(folder)
    del content["config.yaml"], content["environment.json"]  # both name the folder
    for name in [name for name in content if name.endswith("/state.json")]:
        sums = name.replace("state.json", "checksums.sha256")
        digest = hashlib.sha256(content[name]).hexdigest().encode()
        content[sums] = content[sums].replace(digest, b"right")
        content[name] = json.dumps(_untimed(json.loads(content[name]))).encode()
    lines = [_untimed(json.loads(line)) for line in content["metrics.jsonl"].splitlines()]
    return {**content, "metrics.jsonl": json.dumps(lines).encode()}


def files_below(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _untimed(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _untimed(one) for key, one in values.items() if not key.endswith("_seconds")}
    return [_untimed(one) for one in values] if isinstance(values, list) else values
