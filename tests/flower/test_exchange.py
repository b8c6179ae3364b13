"""Messages over Flower's grid: sent one by one, pulled one by one, errors as reasons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from sfedlora.flower.envelope import Envelope
from sfedlora.flower.exchange import SLACK_SECONDS, GridExchange, Lost
from sfedlora.flower.records import from_records, to_records

pytestmark = pytest.mark.usefixtures("flower_process")


class FakeGrid(Grid):
    """A grid without a link: what was pushed, and the replies that a test puts in."""

    def __init__(self, ids: list[Any]) -> None:
        self.pushed: list[Message] = []
        self.replies: dict[str, Message] = {}
        self.pulled: list[list[str]] = []
        self._ids = ids

    def get_node_ids(self) -> Iterable[int]:
        return [3, 1, 2]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        given = list(messages)
        assert len(given) == 1
        self.pushed += given
        return [self._ids.pop(0)] if self._ids else []  # Flower gives None, or nothing, for what it does not take

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        self.pulled.append(wanted)
        return [self.replies.pop(one) for one in wanted if one in self.replies]

    def set_run(self, run: object) -> NoReturn:
        raise NotImplementedError

    @property
    def run(self) -> NoReturn:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError

    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> NoReturn:
        raise NotImplementedError


def test_messages_go_out_one_by_one_with_their_kind_and_time() -> None:
    grid = FakeGrid(["m1", "m2"])
    exchange = GridExchange(grid)
    assert exchange.nodes() == {1, 2, 3}
    ids = exchange.push("round", {2: Envelope("a", data=b"1234"), 1: Envelope("b")}, seconds=5.0)
    assert ids == {2: "m1", 1: "m2"}
    assert [message.metadata.dst_node_id for message in grid.pushed] == [2, 1]
    assert {message.metadata.message_type for message in grid.pushed} == {"train"}
    assert {message.metadata.ttl for message in grid.pushed} == {5.0 + SLACK_SECONDS}
    assert from_records(grid.pushed[0].content) == Envelope("a", data=b"1234")
    exchange.push("hello", {1: Envelope("c")}, seconds=5.0)
    assert grid.pushed[2].metadata.message_type == "query"


def test_an_answer_is_pulled_when_it_is_there() -> None:
    grid = FakeGrid(["m1"])
    exchange = GridExchange(grid)
    exchange.push("round", {1: Envelope("question")}, seconds=5.0)
    assert exchange.pull("m1") is None
    grid.replies["m1"] = Message(to_records(Envelope("answer", data=b"1234")), reply_to=grid.pushed[0])
    assert exchange.pull("m1") == Envelope("answer", data=b"1234")
    assert grid.pulled == [["m1"], ["m1"]]


def test_the_text_of_an_error_is_left_out() -> None:
    grid = FakeGrid(["m1"])
    exchange = GridExchange(grid)
    exchange.push("round", {1: Envelope("question")}, seconds=5.0)
    grid.replies["m1"] = Message(Error(code=2, reason="/home/ann/patients.csv"), reply_to=grid.pushed[0])
    assert exchange.pull("m1") == Lost("the node did not answer (Flower's code 2)")


def test_other_records_are_a_lost_answer() -> None:
    grid = FakeGrid(["m1"])
    exchange = GridExchange(grid)
    exchange.push("round", {1: Envelope("question")}, seconds=5.0)
    grid.replies["m1"] = Message(RecordDict({"x": ConfigRecord({"facts": "{}"})}), reply_to=grid.pushed[0])
    answer = exchange.pull("m1")
    assert isinstance(answer, Lost)
    assert "'x'" in answer.reason


@pytest.mark.parametrize("ids", [[], [None]])
def test_a_message_that_flower_does_not_take_is_lost(ids: list[str | None]) -> None:
    exchange = GridExchange(FakeGrid(ids))
    assert exchange.push("round", {1: Envelope("question")}, seconds=5.0) == {1: ""}
    assert exchange.pull("") == Lost("the message could not be sent")
