"""Who takes part: greetings, refusals, nodes that go, come back and pretend. No model is loaded here."""

from __future__ import annotations

from typing import Any

import pytest

from flower.local_exchange import Answer, LocalExchange, Node
from sfedlora.errors import RunError
from sfedlora.flower.envelope import Envelope, failure
from sfedlora.flower.exchange import Lost
from sfedlora.flower.protocol import HelloReply, HelloRequest, seal
from sfedlora.flower.sites import SiteRecord, Sites

HELLO = seal(HelloRequest(protocol=1, federation_id="f", config_sha256="0"))


def site(client_id: str, **changed: Any) -> Node:
    values = {"client_id": client_id, "num_examples": 5, "base_sha256": "base", "dtype": "float32", "versions": {}}
    answer = seal(HelloReply(**{**values, **changed}))
    return lambda envelope: answer if '"hello"' in envelope.facts else Envelope(f"answer of {client_id}")


class Scene:
    """Sites over an exchange, and what was logged."""

    def __init__(self, nodes: dict[int, Node], allowed: frozenset[str] | None = None) -> None:
        self.lines: list[str] = []
        self.exchange = LocalExchange(nodes)
        self.sites = Sites(self.exchange, HELLO, base_sha256="base", allowed=allowed, log=self.lines.append)

    def settle(self) -> list[str]:
        """Who is connected after every node was greeted and has answered."""
        self.sites.wait_for(99, enough=0, seconds=0.05)
        return self.sites.connected()

    def ask(self, *client_ids: str, seconds: float = 5.0) -> dict[str, Envelope | Lost]:
        return dict(self.sites.ask(client_ids, lambda _: Envelope("question"), seconds=seconds))

    def num_greetings(self) -> int:
        return sum(envelope is HELLO for _, _, envelope in self.exchange.sent)


def test_sites_are_known_by_what_they_say() -> None:
    scene = Scene({1: site("b", num_examples=3, versions={"torch": "2"}), 2: site("a")})
    scene.sites.wait_for(2, enough=2, seconds=5.0)
    assert scene.sites.connected() == ["a", "b"]
    assert scene.sites.known["b"] == SiteRecord(3, "float32", {"torch": "2"})
    assert scene.num_greetings() == 2


def test_too_few_sites_end_the_run_and_enough_of_them_begin_it() -> None:
    scene = Scene({1: site("a")})
    scene.sites.wait_for(3, enough=1, seconds=0.05)
    with pytest.raises(RunError, match=r"1 sites reported within 0\.05 s .*flower\.min_replies is 2"):
        scene.sites.wait_for(3, enough=2, seconds=0.05)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (site("x"), "'x' is not in flower.sites"),
        (site("a", base_sha256="other"), "a base model with other weights"),
        (lambda _: failure("message"), "failed with code 'message'"),
        (lambda _: Envelope("garbage"), "malformed HelloReply"),
        (lambda _: Envelope('{"kind":"round-reply"}'), "malformed HelloReply"),
    ],
)
def test_a_node_that_has_no_place_is_refused_once_and_asked_nothing_more(node: Node, reason: str) -> None:
    scene = Scene({1: site("b"), 7: node}, allowed=frozenset({"a", "b"}))
    assert scene.settle() == ["b"]
    scene.settle()
    [line] = [line for line in scene.lines if "not taken" in line]
    assert "node 7" in line
    assert reason in line
    assert scene.num_greetings() == 2


def test_a_refused_node_that_is_started_again_is_asked_again() -> None:
    scene = Scene({7: lambda _: failure("data")})
    assert scene.settle() == []
    node = scene.exchange.connected.pop(7)
    assert node is not None
    scene.settle()
    scene.exchange.connected[7] = site("a")
    assert scene.settle() == ["a"]


def test_a_greeting_that_was_lost_is_sent_again() -> None:
    answers: list[Answer] = [Lost("the link was down"), None]
    own = site("a")
    scene = Scene({1: lambda envelope: answers.pop(0) if answers else own(envelope)})
    scene.sites.wait_for(1, enough=1, seconds=5.0)
    assert scene.num_greetings() == 2


def test_a_second_node_cannot_take_the_name_of_a_connected_one() -> None:
    scene = Scene({1: site("a"), 2: site("a")})
    assert scene.settle() == ["a"]
    scene.settle()
    assert scene.ask("a")["a"] == Envelope("answer of a")
    assert [node for node, way, envelope in scene.exchange.sent if envelope.facts == "question"] == [1]
    assert [line for line in scene.lines if "not taken" in line] == [
        "node 2 is not taken: client id 'a' belongs to another node, which is connected"
    ]
    assert scene.num_greetings() == 2


def test_a_site_that_was_started_again_takes_over_when_its_old_node_is_gone() -> None:
    scene = Scene({1: site("a")})
    scene.settle()
    scene.sites.accept("a", 3)
    scene.exchange.connected[2] = site("a")  # the link still takes node 1 for alive
    scene.settle()
    del scene.exchange.connected[1]
    assert scene.settle() == ["a"]
    scene.ask("a")
    assert [node for node, way, envelope in scene.exchange.sent if envelope.facts == "question"] == [2]
    assert scene.sites.known["a"].accepted_round == 3


def test_a_site_that_comes_back_with_other_examples_is_refused() -> None:
    scene = Scene({1: site("a")})
    scene.settle()
    scene.exchange.connected = {2: site("a", num_examples=6)}
    assert scene.settle() == []
    assert "had 5 training examples and now states 6" in scene.lines[-1]


def test_clients_that_are_not_there_are_lost_at_once_and_the_others_asked() -> None:
    scene = Scene({1: site("a"), 2: site("b")})
    scene.settle()
    del scene.exchange.connected[2]
    assert scene.ask("a", "b", seconds=60.0) == {"a": Envelope("answer of a"), "b": Lost("not connected")}


def test_an_answer_after_the_deadline_is_late() -> None:
    scene = Scene({1: site("a"), 2: lambda envelope: site("b")(envelope) if '"hello"' in envelope.facts else None})
    scene.settle()
    answers = scene.ask("a", "b", seconds=0.1)
    assert answers["a"] == Envelope("answer of a")
    assert answers["b"] == Lost("no answer before the deadline (0.1 s, flower.round_deadline_seconds)")


def test_a_node_that_goes_while_it_is_asked_is_lost_before_the_deadline() -> None:
    scene = Scene({1: site("a"), 2: site("b")})
    scene.settle()

    def going(envelope: Envelope) -> Answer:
        scene.exchange.connected.pop(2, None)
        return site("a")(envelope)

    scene.exchange.connected[1] = going
    assert scene.ask("a", "b", seconds=60.0)["b"] == Lost("the node is gone")


def test_new_nodes_are_greeted_while_others_are_asked() -> None:
    scene = Scene({1: site("a")})
    scene.settle()
    scene.exchange.connected[2] = site("b")
    scene.ask("a")
    assert scene.settle() == ["a", "b"]
