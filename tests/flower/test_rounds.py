"""Rounds that survive people: bad answers, late ones, sites that come, go, forget and fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flower.federations import TOPICS, exchange_of, small_config, small_files
from flower.local_exchange import Answer, LocalExchange, Node, facts, site_of
from sfedlora import RunConfig
from sfedlora.errors import RunError
from sfedlora.flower.envelope import Envelope, failure
from sfedlora.flower.exchange import Lost
from sfedlora.flower.server import serve
from sfedlora.storage import read_tensors

GOOD, BAD = TOPICS[:2]
"""The clients of nodes 1 and 2."""


def served(config: RunConfig, exchange: LocalExchange, lines: list[str] | None = None) -> Path:
    log = lines if lines is not None else []
    return serve(config, exchange, resume=False, log=log.append).path


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def asked(exchange: LocalExchange, node: int) -> list[dict[str, Any]]:
    """The round requests to a node."""
    found = [facts(envelope) for to, way, envelope in exchange.sent if to == node and way == "down"]
    return [one for one in found if one["kind"] == "round"]


def round_of(envelope: Envelope) -> int:
    """The round of a training request; 0 for other messages."""
    given = facts(envelope)
    return int(str(given["round_num"])) if given.get("train") else 0


def edited(envelope: Answer, **changed: Any) -> Envelope:
    """An answer with other facts; None removes one."""
    assert isinstance(envelope, Envelope)
    values = {**facts(envelope), **changed}
    return replace(envelope, facts=json.dumps({key: one for key, one in values.items() if one is not None}))


def with_numbers(envelope: Answer, change: Callable[[Any], Any]) -> Envelope:
    """An answer with other factors."""
    assert isinstance(envelope, Envelope)
    numbers = np.frombuffer(envelope.data, dtype="<f4").copy()
    return replace(envelope, data=np.asarray(change(numbers), dtype="<f4").tobytes())


def relaid(envelope: Answer, change: Callable[[list[Any]], list[Any]]) -> Envelope:
    """An answer with another layout of the same bytes."""
    assert isinstance(envelope, Envelope)
    layout: Any = facts(envelope)["layout"]
    return edited(envelope, layout=change([list(entry) for entry in layout]))


def _with_nan(numbers: Any) -> Any:
    numbers[3] = np.nan
    return numbers


def _with_inf(numbers: Any) -> Any:
    numbers[-1] = -np.inf
    return numbers


def _b_instead(layout: list[Any]) -> list[Any]:
    return [[layout[0][0].replace("a:", "b:", 1), layout[0][1]], *layout[1:]]


def data_of(answer: Answer) -> bytes:
    assert isinstance(answer, Envelope)
    return answer.data


Trick = Callable[[Answer, LocalExchange], Answer]
TRICKS: dict[str, tuple[Trick, str]] = {
    "late": (lambda answer, _: None, "no answer before the deadline"),
    "lost": (lambda answer, _: Lost("the node did not answer (Flower's code 3)"), "Flower's code 3"),
    "failed": (lambda answer, _: failure("training"), "failed with code 'training'"),
    "unknown failure": (lambda answer, _: failure("my text"), "malformed RoundReply"),
    "no JSON": (lambda answer, _: Envelope("{", data=data_of(answer)), "malformed RoundReply"),
    "nothing": (lambda answer, _: Envelope(""), "malformed RoundReply"),
    "another kind": (lambda answer, _: edited(answer, kind="hello-reply"), "malformed RoundReply: 'kind'"),
    "another fact": (lambda answer, _: edited(answer, b=[1.0]), "malformed RoundReply: 'b'"),
    "a fact less": (lambda answer, _: edited(answer, num_examples=None), "malformed RoundReply: 'num_examples'"),
    "other examples": (lambda answer, _: edited(answer, num_examples=10**6), "states 1000000 training examples"),
    "no examples": (lambda answer, _: edited(answer, num_examples=0), "states 0 training examples"),
    "another round": (lambda answer, _: edited(answer, round_num=99), "for round 99; expected"),
    "another client": (lambda answer, _: edited(answer, client_id=GOOD), f"a reply of client '{GOOD}'"),
    "another site's answer": (
        lambda answer, exchange: [one for node, way, one in exchange.sent if (node, way) == (1, "up")][-1],
        f"a reply of client '{GOOD}'",
    ),
    "an answer again": (
        lambda answer, exchange: [one for node, way, one in exchange.sent if (node, way) == (2, "up")][1],
        "for round 1; expected",
    ),
    "B of another round": (lambda answer, _: edited(answer, personal_round=0), "used the B of round 0; asked for"),
    "not trained": (lambda answer, _: edited(answer, trained=False), "no update in the reply"),
    "nothing measured": (lambda answer, _: edited(answer, measured=None), "no measurements in the reply"),
    "nothing evaluated": (lambda answer, _: edited(answer, evaluated={}), "evaluated .*; asked for"),
    "evaluated on test": (
        lambda answer, _: edited(answer, evaluated={"test": {"num_examples": 1, "loss": 0.0}}),
        "evaluated .*; asked for",
    ),
    "evaluated to NaN": (
        lambda answer, _: edited(answer, evaluated={"validation": {"num_examples": 1, "loss": float("nan")}}),
        "malformed RoundReply: 'evaluated.validation.loss'",
    ),
    "NaN": (lambda answer, _: with_numbers(answer, _with_nan), "holds NaN or infinite values"),
    "infinite": (lambda answer, _: with_numbers(answer, _with_inf), "holds NaN or infinite values"),
    "too few bytes": (lambda answer, _: with_numbers(answer, lambda all_: all_[:-1]), "the layout needs"),
    "too many bytes": (lambda answer, _: with_numbers(answer, lambda all_: [*all_, 1.0]), "the layout needs"),
    "half the bytes": (lambda answer, _: replace(answer, dtype="bfloat16"), "factors in bfloat16; asked for float32"),  # type: ignore[type-var]
    "no factors": (lambda answer, _: relaid(answer, lambda layout: []), "is missing"),
    "a factor less": (lambda answer, _: relaid(answer, lambda layout: layout[1:]), "is missing"),
    "a factor more": (lambda answer, _: relaid(answer, lambda layout: [*layout, ["x", [1]]]), "'x' was not asked for"),
    "a factor twice": (lambda answer, _: relaid(answer, lambda layout: [*layout, layout[0]]), "twice"),
    "a B": (lambda answer, _: relaid(answer, _b_instead), "is missing"),
    "turned": (
        lambda answer, _: relaid(answer, lambda layout: [[layout[0][0], layout[0][1][::-1]], *layout[1:]]),
        "has shape",
    ),
    "huge": (lambda answer, _: relaid(answer, lambda layout: [[layout[0][0], [10**9] * 8], *layout[1:]]), "has shape"),
    "beyond numbers": (
        lambda answer, _: relaid(answer, lambda layout: [[layout[0][0], [10**30]], *layout[1:]]),
        "malformed RoundReply: 'layout",
    ),
    "negative": (
        lambda answer, _: relaid(answer, lambda layout: [[layout[0][0], [-4, -8]], *layout[1:]]),
        "malformed RoundReply: 'layout",
    ),
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LocalExchange, list[str]]:
    """A run in which the second site plays one trick a round, from round 2 on, and behaves in the last two."""
    tmp_path = tmp_path_factory.mktemp("attacked")
    config = small_config(tmp_path, rounds__num_rounds=len(TRICKS) + 3, flower__round_deadline_seconds=2.0)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    honest, tricks, lines = exchange.connected[2], list(TRICKS.values()), list[str]()

    def node(envelope: Envelope) -> Answer:
        round_num = round_of(envelope)
        if not 2 <= round_num < len(tricks) + 2:
            return honest(envelope)
        answer = honest(envelope)
        return tricks[round_num - 2][0](answer, exchange)

    exchange.connected[2] = node
    return served(config, exchange, lines), exchange, lines


@pytest.mark.parametrize("name", TRICKS)
def test_a_bad_answer_is_excluded_and_recorded(name: str, attacked: tuple[Path, LocalExchange, list[str]]) -> None:
    path, _, lines = attacked
    number = list(TRICKS).index(name)
    record = metrics(path)[number + 1]
    assert record["round_num"] == number + 2
    assert list(record["excluded"]) == [BAD]
    assert re.search(TRICKS[name][1], record["excluded"][BAD]), record["excluded"][BAD]
    assert len(record["excluded"][BAD]) < 500
    assert list(record["clients"]) == [GOOD]
    assert any(f"round {number + 2}: site '{BAD}' is excluded" in line for line in lines)


def test_the_b_of_an_excluded_client_is_not_advanced_and_it_goes_on_afterwards(
    attacked: tuple[Path, LocalExchange, list[str]],
) -> None:
    path, exchange, _ = attacked
    records, last = metrics(path), len(TRICKS) + 2
    assert [record["round_num"] for record in records] == list(range(1, last + 2))
    assert [records[number - 1]["excluded"] for number in (1, last, last + 1)] == [{}, {}, {}]
    personal = {one["round_num"]: one["personal_round"] for one in asked(exchange, 2) if one["train"]}
    assert personal == {1: 0, **dict.fromkeys(range(2, last + 1), 1), last + 1: last}
    honest = {one["round_num"]: one["personal_round"] for one in asked(exchange, 1) if one["train"]}
    assert honest == {number: number - 1 for number in range(1, last + 2)}


def test_a_round_with_too_few_answers_ends_the_run_which_can_go_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, flower__min_replies=2)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    honest = exchange.connected[2]
    exchange.connected[2] = lambda one: failure("data") if round_of(one) == 2 else honest(one)
    message = rf"round 2: 1 usable replies, flower\.min_replies is 2 \({BAD}: .*'data'.*resume=true"
    with pytest.raises(RunError, match=message):
        served(config, exchange)
    exchange.connected[2] = honest
    serve(config, exchange, resume=True, log=lambda _: None)
    assert [record["excluded"] for record in metrics(Path(config.output))] == [{}, {}, {}]


@pytest.mark.parametrize("round_num", [1, 2])
def test_a_round_in_which_all_fail_ends_the_run(round_num: int, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")

    def failing(honest: Node) -> Node:
        return lambda envelope: failure("memory") if round_of(envelope) == round_num else honest(envelope)

    exchange.connected = {node: failing(honest) for node, honest in exchange.connected.items()}
    with pytest.raises(RunError, match=rf"round {round_num}: 0 usable replies, .*{GOOD}: .*memory.*{BAD}: .*memory"):
        served(config, exchange)


def test_a_run_whose_last_evaluation_nobody_answers_is_not_finished(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    honest = dict(exchange.connected)

    def failing(own: Node) -> Node:
        return lambda envelope: failure("memory") if facts(envelope).get("train") is False else own(envelope)

    exchange.connected = {node: failing(own) for node, own in honest.items()}
    with pytest.raises(RunError, match="0 usable replies"):
        served(config, exchange)
    assert not (Path(config.output) / "summary.json").exists()
    exchange.connected = honest
    assert serve(config, exchange, resume=True, log=lambda _: None).summary()["last"]["round_num"] == 3


def test_evaluation_by_a_site_that_fails_leaves_the_round_without_it(tmp_path: Path) -> None:
    config = small_config(tmp_path, rounds__cohort_size=1, evaluation__clients=1, flower__metrics="per-client")
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")

    def failing(own: Node) -> Node:
        def node(envelope: Envelope) -> Answer:
            given = facts(envelope)
            return failure("memory") if given.get("train") is False and given["round_num"] != 4 else own(envelope)

        return node

    exchange.connected = {node: failing(own) for node, own in exchange.connected.items()}
    records = metrics(served(config, exchange))
    assert len(records) == 3
    assert all(record["excluded"] == {} for record in records)
    assert any(record["eval_loss"] is None for record in records)


def _late_site(tmp_path: Path, **overrides: Any) -> tuple[RunConfig, LocalExchange]:
    """A federation of two whose second site connects while round 1 is under way."""
    given = {"flower__sites": [GOOD, BAD], "flower__join_deadline_seconds": 1.0, "partition__num_clients": 2}
    config = small_config(tmp_path, **{**given, **overrides})
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    late, first = exchange.connected.pop(2), exchange.connected[1]

    def node(envelope: Envelope) -> Answer:
        if round_of(envelope) == 1:
            exchange.connected[2] = late
        return first(envelope)

    exchange.connected[1] = node
    return config, exchange


def test_a_site_that_joins_later_starts_from_b_0_and_changes_neither_gamma_nor_what_was_before(tmp_path: Path) -> None:
    config, exchange = _late_site(tmp_path, rounds__num_rounds=4)
    lines: list[str] = []
    path = served(config, exchange, lines)
    records = metrics(path)
    cohorts = [record["cohort"] for record in records]
    assert cohorts[0] == [GOOD]
    assert cohorts[-1] == [GOOD, BAD]
    joined = next(number for number, cohort in enumerate(cohorts, start=1) if BAD in cohort)
    own = [(one["round_num"], one["personal_round"]) for one in asked(exchange, 2) if one["train"]]
    assert own == [(joined, 0), *((number, number - 1) for number in range(joined + 1, 5))]
    assert {record["scaling"] for record in records} == {16 * (1 / 4) ** 0.5}  # N = 1: the sites that it began with
    assert {one["scaling"] for node in (1, 2) for one in asked(exchange, node)} == {16 * (1 / 4) ** 0.5}
    assert {record["effective_clients"] for record in records} == {1.0}
    alone_folder = tmp_path / "alone"
    alone_folder.mkdir()
    alone = small_config(alone_folder, partition__num_clients=1, rounds__num_rounds=joined - 1)
    [(client_id, file), _] = small_files(alone_folder).items()
    without = served(alone, exchange_of(alone, {client_id: file}, alone_folder / "sites"))
    sent = [data_of(envelope) for node, way, envelope in exchange.sent if node == 1 and way == "up"]
    assert metrics(without)[0]["train_loss"] == records[0]["train_loss"]
    shared = read_tensors(without / "adapters" / "shared" / "adapter_model.safetensors")
    after = b"".join(tensor.numpy().tobytes() for name, tensor in shared.items() if "lora_A" in name)
    assert len(sent[joined - 1]) == len(after)
    assert sorted(np.frombuffer(sent[joined - 1], "<f4")) == sorted(np.frombuffer(after, "<f4"))


def test_a_site_that_lost_its_state_starts_anew_and_is_recorded(tmp_path: Path) -> None:
    config = small_config(tmp_path, rounds__num_rounds=4)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    honest = exchange.connected[2]

    def node(envelope: Envelope) -> Answer:
        if round_of(envelope) == 2:
            shutil.rmtree(tmp_path / "sites" / BAD)
        return honest(envelope)

    exchange.connected[2] = node
    records = metrics(served(config, exchange))
    assert [list(record["excluded"]) for record in records] == [[], [BAD], [], []]
    assert "lost-state" in records[1]["excluded"][BAD]
    own = {one["round_num"]: one["personal_round"] for one in asked(exchange, 2) if one["train"]}
    assert own == {1: 0, 2: 1, 3: 0, 4: 3}


def test_a_site_whose_state_is_damaged_is_excluded_and_not_reset(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    honest = exchange.connected[2]

    def node(envelope: Envelope) -> Answer:
        if round_of(envelope) == 2:
            for path in (tmp_path / "sites" / BAD).rglob("personal.safetensors"):
                path.write_bytes(path.read_bytes()[:-1])
        return honest(envelope)

    exchange.connected[2] = node
    records = metrics(served(config, exchange))
    assert ["'state'" in record["excluded"].get(BAD, "") for record in records] == [False, True, True]
    own = {one["round_num"]: one["personal_round"] for one in asked(exchange, 2) if one["train"]}
    assert own == {1: 0, 2: 1, 3: 1}


def test_a_node_that_is_started_again_goes_on_with_its_b(tmp_path: Path) -> None:
    config = small_config(tmp_path, rounds__num_rounds=4)
    files = small_files(tmp_path)
    exchange = exchange_of(config, files, tmp_path / "sites")

    def dying(envelope: Envelope) -> Answer:
        if round_of(envelope) != 2:
            return honest(envelope)
        del exchange.connected[2]
        exchange.connected[12] = site_of(config, BAD, files[BAD], tmp_path / "sites" / BAD).answer
        return Lost("the node is gone")

    honest = exchange.connected[2]
    exchange.connected[2] = dying
    records = metrics(served(config, exchange))
    assert [list(record["excluded"]) for record in records] == [[], [BAD], [BAD], []]
    assert records[2]["excluded"][BAD] == "not connected"
    assert [one["personal_round"] for one in asked(exchange, 12) if one["train"]] == [1]


def test_a_run_waits_for_nodes_that_are_all_away_for_a_while(tmp_path: Path) -> None:
    config = small_config(tmp_path, flower__min_replies=2)
    undisturbed = tmp_path / "undisturbed"
    expected = served(
        config.with_values({"output": str(undisturbed)}),
        exchange_of(config, small_files(tmp_path), tmp_path / "other-sites"),
    )
    files = small_files(tmp_path)
    exchange = exchange_of(config, files, tmp_path / "sites")
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("round 1/"):
            exchange.connected = {
                node + 10: site_of(config, client_id, path, tmp_path / "sites" / client_id).answer
                for node, (client_id, path) in enumerate(files.items())
            }

    path = serve(config, exchange, resume=False, log=log).path
    assert [record["excluded"] for record in metrics(path)] == [{}, {}, {}]
    name = Path("adapters", "shared", "adapter_model.safetensors")
    assert (path / name).read_bytes() == (expected / name).read_bytes()


def test_more_sites_than_asked_for_join_later(tmp_path: Path) -> None:
    config = small_config(tmp_path, partition__num_clients=1)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    path = served(config, exchange)
    assert list(json.loads((path / "partition.json").read_text())["clients"]) == [GOOD]
    records = metrics(path)
    assert {record["effective_clients"] for record in records} == {1.0}
    assert records[-1]["cohort"] == [GOOD, BAD]


@pytest.mark.parametrize(
    ("key", "value"),
    [("local__learning_rate", 1.0), ("flower__federation_id", "another"), ("flower__wire_dtype", "bfloat16")],
)
def test_a_site_with_another_configuration_is_not_taken(key: str, value: object, tmp_path: Path) -> None:
    config = small_config(tmp_path, flower__join_deadline_seconds=0.5)
    exchange = exchange_of(small_config(tmp_path, **{key: value}), small_files(tmp_path), tmp_path / "sites")
    lines: list[str] = []
    with pytest.raises(RunError, match="0 sites reported"):
        served(config, exchange, lines)
    assert [line for line in lines if "code 'message'" in line] == lines
    assert len(lines) == 2


@pytest.mark.parametrize("mode", ["per-client", "aggregate", "none"])
def test_what_is_sent_and_recorded_of_what_sites_measure(mode: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, rounds__num_rounds=2, flower__metrics=mode)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    path = served(config, exchange)
    sent = [facts(envelope) for _, way, envelope in exchange.sent if way == "up"]
    replies = [one for one in sent if one["kind"] == "round-reply"]
    assert len(replies) >= 6
    for one in replies:
        assert (one["measured"] is not None) == (mode != "none" and bool(one["trained"]))
        assert bool(one["evaluated"]) == (mode != "none")
    for record in metrics(path):
        assert (record["train_loss"] is None) == (mode == "none")
        assert (record["eval_loss"] is None) == (mode == "none")
        assert set(record["clients"]) == {GOOD, BAD}
        keys = {key for one in record["clients"].values() for key in one}
        assert keys == {"num_examples"} if mode != "per-client" else {"train_loss", "eval_loss"} < keys


def test_bfloat16_halves_what_is_sent_on_both_ways(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        config = small_config(folder, rounds__num_rounds=2, flower__wire_dtype=dtype)
        exchange = exchange_of(config, small_files(folder), folder / "sites")
        path = served(config, exchange)
        assert {envelope.dtype for _, _, envelope in exchange.sent if envelope.data} == {dtype}
        sizes[dtype] = [(record["bytes_up"], record["bytes_down"]) for record in metrics(path)]
        losses = [record["eval_loss"] for record in metrics(path)]
        assert losses[-1] < losses[0]
    assert [(2 * up, 2 * down) for up, down in sizes["bfloat16"]] == sizes["float32"]
