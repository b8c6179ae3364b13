"""Who takes part: which node is which client, greeting of new nodes, and questions with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sfedlora.errors import RunError
from sfedlora.flower.exchange import Exchange, Lost
from sfedlora.flower.protocol import Envelope, HelloReply, MessageError, open_facts, open_failure

__all__ = ["Log", "SiteRecord", "Sites"]

Log = Callable[[str], None]
NOT_CONNECTED = "not connected"
LATE = "no answer before the deadline"


@dataclass(frozen=True)
class SiteRecord:
    """What the server knows of a site.

    Attributes:
        num_examples: its training examples.
        dtype: in which it loads the base model.
        versions: of its libraries.
        accepted_round: the last round in which its update was used, whose B it serves; 0: none yet.
    """

    num_examples: int
    dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    accepted_round: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Sites:
    """Owner of the connection to the sites: greets nodes, asks clients, knows who is who.

    A client id belongs to the node that gave it first, as long as that node is connected. Another node that gives it,
    which may be the same site started again, is asked again when the first is gone.
    """

    def __init__(
        self, exchange: Exchange, hello: Envelope, *, base_sha256: str, allowed: frozenset[str] | None, log: Log
    ) -> None:
        """Nobody is known yet.

        Args:
            exchange: the transport.
            hello: the greeting.
            base_sha256: digest of the base model that all must have.
            allowed: client ids that may take part; None: all.
            log: takes one line of text.
        """
        self._exchange, self._hello, self._log = exchange, hello, log
        self._base_sha256, self._allowed = base_sha256, allowed
        self._greetings: dict[int, str] = {}  # node -> id of a greeting under way
        self._refused: set[int] = set()
        self._waiting: dict[int, str] = {}  # node -> the client id that it may have once the node that has it is gone
        self._node_of: dict[str, int] = {}
        self.known: dict[str, SiteRecord] = {}

    def wait_for(self, expected: int, *, enough: int, seconds: float) -> None:
        """Greet nodes until so many sites are connected, or the time is over and enough of them are.

        Raises:
            RunError: not enough did.
        """
        end = time.monotonic() + seconds
        while len(self.connected()) < expected:
            self.greet(seconds=max(1.0, end - time.monotonic()))
            self._hear()
            if time.monotonic() > end:
                break
            self._exchange.wait()
        if len(self.connected()) < enough:
            raise RunError(
                f"{len(self.connected())} sites reported within {seconds:g} s (flower.join_deadline_seconds), but "
                f"flower.min_replies is {enough}; start the nodes, or see in their logs why they could not answer"
            )

    def connected(self) -> list[str]:
        """The client ids of nodes that are connected now."""
        nodes = self._exchange.nodes()
        return sorted(client_id for client_id, node in self._node_of.items() if node in nodes)

    def greet(self, *, seconds: float) -> None:
        """Ask nodes that are new who they are."""
        nodes = self._exchange.nodes()
        for node in self._greetings.keys() - nodes:
            del self._greetings[node]
        self._refused &= nodes
        self._waiting = {
            node: client_id
            for node, client_id in self._waiting.items()
            if node in nodes and self._node_of[client_id] in nodes
        }
        known = {*self._node_of.values(), *self._greetings, *self._refused, *self._waiting}
        new = nodes - known
        if new:
            self._greetings |= self._exchange.push("hello", dict.fromkeys(sorted(new), self._hello), seconds=seconds)

    def ask(
        self, client_ids: Collection[str], request_for: Callable[[str], Envelope], *, seconds: float
    ) -> Iterator[tuple[str, Envelope | Lost]]:
        """Ask clients and yield every answer as it comes, then `Lost` for those that did not answer in time.

        Requests are made one after the other, answers pulled one after the other: memory holds one of them. New nodes
        are greeted meanwhile; they take part from the next round on.
        """
        end = time.monotonic() + seconds
        here = set(self.connected())
        for client_id in sorted({*client_ids} - here):
            yield client_id, Lost(NOT_CONNECTED)
        open_messages: dict[str, str] = {}
        for client_id in sorted({*client_ids} & here):
            node = self._node_of[client_id]
            sent = self._exchange.push("round", {node: request_for(client_id)}, seconds=seconds)
            open_messages[client_id] = sent[node]
        self.greet(seconds=seconds)
        while open_messages and time.monotonic() < end:
            self._hear()
            for client_id, message_id in list(open_messages.items()):
                answer = self._exchange.pull(message_id)
                if answer is not None:
                    del open_messages[client_id]
                    yield client_id, answer
                del answer  # before the next one is pulled
            if open_messages:
                self._exchange.wait()
        for client_id in sorted(open_messages):
            yield client_id, Lost(f"{LATE} ({seconds:g} s, flower.round_deadline_seconds)")

    def accept(self, client_id: str, round_num: int) -> None:
        """Note that a client's update of a round was used; 0: that it has to start anew."""
        self.known[client_id] = replace(self.known[client_id], accepted_round=round_num)

    def _hear(self) -> None:
        """Take in answers to greetings."""
        for node, message_id in list(self._greetings.items()):
            answer = self._exchange.pull(message_id)
            if answer is None:
                continue
            del self._greetings[node]
            reason = answer.reason if isinstance(answer, Lost) else self._register(node, answer)
            if reason:
                self._log(f"node {node} is not taken: {reason}")
                if not isinstance(answer, Lost) and node not in self._waiting:
                    self._refused.add(node)

    def _register(self, node: int, answer: Envelope) -> str:
        """Take a node as a client; returns why not, or nothing."""
        failure = open_failure(answer)
        if failure is not None:
            return f"it failed with code {failure.code!r}; its own log says why"
        try:
            reply = open_facts(answer, HelloReply)
        except MessageError as error:
            return str(error)
        refusal = self._refusal(reply)
        owner = self._node_of.get(reply.client_id, node)
        if not refusal and owner != node and owner in self._exchange.nodes():
            self._waiting[node] = reply.client_id
            return f"client id {reply.client_id!r} belongs to another node, which is connected"
        if not refusal:
            client_id, before = reply.client_id, self.known.get(reply.client_id)
            self._node_of[client_id] = node
            site = before or SiteRecord(reply.num_examples)
            self.known[client_id] = replace(site, dtype=reply.dtype, versions=reply.versions)
            self._log(f"site {client_id!r} has joined with {reply.num_examples} training examples")
        return refusal

    def _refusal(self, reply: HelloReply) -> str:
        """Why the federation has no place for a site; empty where it has."""
        client_id, before = reply.client_id, self.known.get(reply.client_id)
        if self._allowed is not None and client_id not in self._allowed:
            return f"client id {client_id!r} is not in flower.sites"
        if reply.base_sha256 != self._base_sha256:
            return f"client {client_id!r} has a base model with other weights than the server's"
        if before is not None and before.num_examples != reply.num_examples:
            return (
                f"client {client_id!r} had {before.num_examples} training examples and now states "
                f"{reply.num_examples}; a federation needs the same data from its first round to its last"
            )
        return ""
