"""Who is connected, and messages to and from them, over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from sfedlora.flower.envelope import Envelope, MessageError
from sfedlora.flower.records import from_records, to_records

__all__ = ["Exchange", "GridExchange", "Kind", "Lost"]

Kind = Literal["hello", "round"]
POLL_SECONDS = 0.2
MESSAGE_TYPES = {"hello": MessageType.QUERY, "round": MessageType.TRAIN}
SLACK_SECONDS = 60.0
"""A message outlives the time that its answer is waited for, so that a late answer is known to be late."""


@dataclass(frozen=True)
class Lost:
    """A message that will not be answered, and why."""

    reason: str


class Exchange(Protocol):
    """Messages to nodes. A node is a number that the transport gives; which client it is, it says itself."""

    def nodes(self) -> frozenset[int]:
        """The nodes that are connected now."""
        ...

    def push(self, kind: Kind, messages: Mapping[int, Envelope], *, seconds: float) -> dict[int, str]:
        """Send a message to each node; node -> id of its message. `seconds` is how long an answer is waited for."""
        ...

    def pull(self, message_id: str) -> Envelope | Lost | None:
        """The answer to a message; None while there is none."""
        ...

    def wait(self) -> None:
        """Let some time pass."""
        ...


@dataclass(frozen=True)
class GridExchange:
    """Flower's grid as an `Exchange`. Answers are pulled one at a time, so that memory holds one of them."""

    grid: Grid

    def nodes(self) -> frozenset[int]:
        """The connected nodes."""
        return frozenset(self.grid.get_node_ids())

    def push(self, kind: Kind, messages: Mapping[int, Envelope], *, seconds: float) -> dict[int, str]:
        """Send them one after the other."""
        ids = {}
        for node, envelope in messages.items():
            message = Message(to_records(envelope), node, MESSAGE_TYPES[kind], ttl=seconds + SLACK_SECONDS)
            pushed = [*self.grid.push_messages([message])]
            ids[node] = (pushed[0] or "") if pushed else ""  # Flower gives none, or nothing, for what it cannot push
        return ids

    def pull(self, message_id: str) -> Envelope | Lost | None:
        """The answer, if it has come."""
        if not message_id:
            return Lost("the message could not be sent")
        for message in self.grid.pull_messages([message_id]):
            if message.has_error():
                return Lost(f"the node did not answer (Flower's code {message.error.code})")
            try:
                return from_records(message.content)
            except MessageError as error:
                return Lost(str(error))
        return None

    def wait(self) -> None:
        """Until the next look."""
        time.sleep(POLL_SECONDS)
