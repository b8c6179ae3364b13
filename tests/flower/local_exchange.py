"""Messages between a server and sites in one process: an `Exchange` whose nodes are real sites, and may misbehave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sfedlora import RunConfig
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.exchange import Kind, Lost
from sfedlora.flower.settings import site_settings
from sfedlora.flower.site import Site

Answer = Envelope | Lost | None
Node = Callable[[Envelope], Answer]


@dataclass
class LocalExchange:
    """Nodes by number; what they answered is kept.

    Attributes:
        connected: node -> what it answers to a message; None for no answer yet.
        sent: every message from the server, and every answer, as (node, direction, envelope).
    """

    connected: dict[int, Node]
    sent: list[tuple[int, str, Envelope]] = field(default_factory=list)
    open: dict[str, tuple[int, Envelope]] = field(default_factory=dict)

    def nodes(self) -> frozenset[int]:
        return frozenset(self.connected)

    def push(self, kind: Kind, messages: Mapping[int, Envelope], *, seconds: float) -> dict[int, str]:
        assert seconds > 0
        assert kind in {"hello", "round"}
        ids = {node: f"{len(self.sent)}-{node}" for node in messages}
        for node, envelope in messages.items():
            self.sent.append((node, "down", envelope))
            self.open[ids[node]] = node, envelope
        return ids

    def pull(self, message_id: str) -> Answer:
        node, envelope = self.open[message_id]
        if node not in self.connected:
            return Lost("the node is gone")
        answer = self.connected[node](envelope)
        if answer is not None:
            del self.open[message_id]
            if isinstance(answer, Envelope):
                self.sent.append((node, "up", answer))
        return answer

    def wait(self) -> None:
        time.sleep(0.01)


def site_of(config: RunConfig, client_id: str, data: Path, state_dir: Path) -> Site:
    """A real site with its own file."""
    node = {"client-id": client_id, "data": str(data), "state-dir": str(state_dir)}
    return Site(site_settings(config, node))


def facts(envelope: Envelope) -> dict[str, object]:
    """The facts of a message as plain values."""
    content: dict[str, object] = json.loads(envelope.facts)
    return content
