"""A site against a hostile server and bad luck; and what leaves it: never B, a head of its own, tokens or texts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import RecordDict
from torch import Tensor
from transformers import AutoTokenizer

import sfedlora
from flower.federations import TOPICS, exchange_of, small_config, small_files
from flower.local_exchange import Answer, LocalExchange, Node, facts, site_of
from sfedlora import RunConfig
from sfedlora.errors import ClientError, DataError, ModelError, StorageError
from sfedlora.flower import site as site_module
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.protocol import open_failure
from sfedlora.flower.records import to_records
from sfedlora.flower.server import serve
from sfedlora.flower.site import Site
from sfedlora.storage import read_tensors
from support.sentiment import write_sentiment

CLIENT = TOPICS[0]


def _objects(content: Any) -> Iterator[Any]:
    yield content
    for child in (content.children or {}).values():
        yield from _objects(child)


def on_the_wire(envelope: Envelope) -> bytes:
    """All bytes that Flower sends for an answer."""
    content: RecordDict = to_records(envelope)
    return b"".join(one.deflate() for one in _objects(content))


def encodings(row: Tensor) -> list[bytes]:
    """A row of numbers as it could be hidden in a message."""
    numbers = row.numpy().astype("<f4")
    halves = torch.from_numpy(numbers.copy()).to(torch.bfloat16).view(torch.int16).numpy().astype("<i2")
    return [
        numbers.tobytes(),
        halves.tobytes(),
        numbers.astype("<f8").tobytes(),
        json.dumps(row.tolist())[1:-1].encode(),
    ]


def rows_of(tensor: Tensor) -> list[Tensor]:
    """Every row and every column that has no zero in it, so that its bytes are its own."""
    table = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)
    lines = [*table, *(table.T if table.shape[0] > 1 else ())]
    return [line.contiguous() for line in lines if line.numel() > 1 and bool((line != 0).all())]


class Watched:
    """An exchange whose sites are looked at after every answer: what they keep, to search for in what they send."""

    def __init__(self, exchange: LocalExchange, state_dir: Path) -> None:
        self.exchange, self.state_dir = exchange, state_dir
        self.secrets: dict[bytes, str] = {}
        exchange.connected = {number: self._watch(node) for number, node in exchange.connected.items()}

    def _watch(self, node: Node) -> Node:
        def answer(envelope: Envelope) -> Answer:
            given = node(envelope)
            for path in self.state_dir.glob("*/*/*/round-*/*.safetensors"):
                for name, tensor in read_tensors(path).items():
                    if tensor.dtype == torch.float32:
                        for row in rows_of(tensor):
                            self.secrets |= dict.fromkeys(encodings(row), f"{path.parent.name}/{path.name}: {name}")
            return given

        return answer

    def found(self) -> set[str]:
        """What of the secrets is in a message of a site."""
        content = b"\n".join(on_the_wire(one) for _, way, one in self.exchange.sent if way == "up")
        return {where for secret, where in self.secrets.items() if secret in content}


def texts_of(files: dict[str, Path]) -> set[str]:
    """What the sites' rows say; topics are client ids here."""
    rows = [json.loads(line) for path in files.values() for line in path.read_text().splitlines()]
    return {str(value) for row in rows for key, value in row.items() if key != "topic" and len(str(value)) >= 12}


def token_bytes(texts: set[str]) -> set[bytes]:
    """Every four tokens in a row, as integers of four and of eight bytes."""
    tokenizer = AutoTokenizer.from_pretrained(Path(sfedlora.__file__).parent / "assets" / "tiny_llama")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sorted(texts)]
    pieces = [row[start : start + 4] for row in ids for start in range(len(row) - 3)]
    return {np.asarray(piece, dtype=dtype).tobytes() for piece in pieces for dtype in ("<i4", "<i8")}


PRIVATE: dict[str, dict[str, Any]] = {
    "sfed": {},
    "local-init": {"lora__init": "local"},
    "moments": {"local__optimizer_state": "keep", "rounds__server_optimizer": "fedyogi"},
    "nothing shared": {"method__name": "local", "lora__scaling": "rslora", "lora__init": "independent"},
    "bfloat16": {"flower__wire_dtype": "bfloat16"},
}


SLOW = ("sfed", "local-init")


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in PRIVATE])
def test_nothing_that_a_site_keeps_is_in_any_message(name: str, tmp_path: Path) -> None:
    config, files = small_config(tmp_path, flower__metrics="per-client", **PRIVATE[name]), small_files(tmp_path)
    exchange = exchange_of(config, files, tmp_path / "sites")
    watched = Watched(exchange, tmp_path / "sites")
    serve(config, exchange, resume=False, log=lambda _: None)
    assert len(watched.secrets) > 500
    assert watched.found() == set()
    sent = [one for _, way, one in exchange.sent if way == "up"]
    assert all(one.data == b"" for one in sent) == (name == "nothing shared")
    wire = b"\n".join(map(on_the_wire, sent))
    assert all(one.data[:64] in wire and one.facts[:40].encode() in wire for one in sent)  # what is sent would be found
    texts = texts_of(files)
    private = token_bytes(texts) | {one for text in texts for one in (text.encode(), json.dumps(text)[1:-1].encode())}
    assert len(private) > 500
    assert {one for one in private if one in wire} == set()


def test_a_head_of_its_own_is_in_no_message(tmp_path: Path) -> None:
    path = write_sentiment(
        tmp_path, runner="serial", threads=1, flower={"federation_id": "test", "metrics": "per-client"}
    )
    values = yaml.safe_load(path.read_text())
    values["data"]["labels"] = ["negative", "positive"]
    values["rounds"] = {**values.get("rounds", {}), "num_rounds": 2}
    values["partition"]["num_clients"] = 2
    config = RunConfig.from_mapping(values)
    rows = Path(config.data.source).read_text().splitlines()
    files = {}
    for client_id, own in (("a", rows[::2]), ("b", rows[1::2])):
        files[client_id] = tmp_path / f"{client_id}.jsonl"
        files[client_id].write_text("\n".join(own) + "\n")
    exchange = exchange_of(config, files, tmp_path / "sites")
    watched = Watched(exchange, tmp_path / "sites")
    serve(config, exchange, resume=False, log=lambda _: None)
    names = set(watched.secrets.values())
    assert any("classifier" in name for name in names), names
    assert any("classifier" not in name for name in names)
    assert watched.found() == set()


def test_a_message_with_a_row_of_b_would_be_found(tmp_path: Path) -> None:
    config = small_config(tmp_path, rounds__num_rounds=1)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    watched = Watched(exchange, tmp_path / "sites")
    serve(config, exchange, resume=False, log=lambda _: None)
    assert watched.found() == set()
    secret = next(iter(watched.secrets))
    node, _, last = exchange.sent[-1]
    exchange.sent[-1] = (node, "up", replace(last, data=b"1234" + secret))
    assert watched.found() == {watched.secrets[secret]}


# A hostile server


class Captive:
    """A site after two rounds, and the message of round 3."""

    def __init__(self, tmp_path: Path) -> None:
        self.config = small_config(tmp_path)
        self.files = small_files(tmp_path)
        self.state_dir = tmp_path / "sites" / CLIENT
        exchange = exchange_of(self.config, self.files, tmp_path / "sites")
        serve(self.config, exchange, resume=False, log=lambda _: None)
        down = [one for node, way, one in exchange.sent if node == 1 and way == "down"]
        self.rounds = {facts(one)["round_num"]: one for one in down if facts(one).get("train")}
        self.hello = down[0]
        self.exchange = exchange

    def site(self) -> Site:
        return site_of(self.config, CLIENT, self.files[CLIENT], self.state_dir)

    @property
    def store(self) -> Path:
        return self.state_dir / "test" / CLIENT


@pytest.fixture(scope="module")
def captive(tmp_path_factory: pytest.TempPathFactory) -> Captive:
    return Captive(tmp_path_factory.mktemp("captive"))


@pytest.fixture(scope="module")
def site(captive: Captive) -> Site:
    return captive.site()


def edited(envelope: Envelope, **changed: Any) -> Envelope:
    return replace(envelope, facts=json.dumps({**facts(envelope), **changed}))


def code_of(envelope: Envelope) -> str | None:
    failure = open_failure(envelope)
    return None if failure is None else failure.code


def relaid(envelope: Envelope, change: Callable[[list[Any]], list[Any]], data: bytes | None = None) -> Envelope:
    given: Any = facts(envelope)["layout"]
    changed = edited(envelope, layout=change([list(entry) for entry in given]))
    return changed if data is None else replace(changed, data=data)


def renamed(layout: list[Any], name: str) -> list[Any]:
    return [[name, layout[0][1]], *layout[1:]]


NOT_A_NUMBER = np.float32(np.nan).tobytes()
HOSTILE: dict[str, Callable[[Envelope], Envelope]] = {
    "another federation": lambda one: edited(one, federation_id="other"),
    "a way out of the state directory": lambda one: edited(one, federation_id="../../other"),
    "another client": lambda one: edited(one, client_id=TOPICS[1]),
    "a client of another folder": lambda one: edited(one, client_id="../../x"),
    "the B of this round": lambda one: edited(one, personal_round=3),
    "the B of a round to come": lambda one: edited(one, personal_round=4, round_num=4),
    "another rank": lambda one: edited(one, rank=1_000_000),
    "draws of another rank": lambda one: edited(one, draw_rank=1_000_000),
    "no rank": lambda one: edited(one, rank=0),
    "infinite gamma": lambda one: edited(one, scaling=float("inf")),
    "no gamma": lambda one: edited(one, scaling=0.0),
    "a split of its own": lambda one: edited(one, evaluate=["train"]),
    "a further fact": lambda one: edited(one, command="rm"),
    "another kind": lambda one: edited(one, kind="shell"),
    "no kind": lambda one: replace(one, facts="{}"),
    "no JSON": lambda one: replace(one, facts="{"),
    "no factors": lambda one: relaid(one, lambda layout: [], b""),
    "bytes without layout": lambda one: relaid(one, lambda layout: []),
    "layout without bytes": lambda one: replace(one, data=b""),
    "a factor of another name": lambda one: relaid(one, lambda layout: renamed(layout, "shared/x")),
    "a B for the site": lambda one: relaid(one, lambda layout: [*layout, ["initial/x", [1]]], one.data + b"\0" * 4),
    "a factor of another kind": lambda one: relaid(
        one, lambda layout: [*layout, ["code/x", [1]]], one.data + b"\0" * 4
    ),
    "extra that is no delta": lambda one: relaid(one, lambda layout: [*layout, ["extra/x", [1]]], one.data + b"\0" * 4),
    "NaN": lambda one: replace(one, data=NOT_A_NUMBER + one.data[4:]),
    "half the bytes": lambda one: replace(one, dtype="bfloat16"),
    "a shape beyond memory": lambda one: relaid(one, lambda layout: [[layout[0][0], [10**9] * 8], *layout[1:]]),
    "a hello as a round": lambda one: edited(one, kind="hello"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_and_changes_nothing(name: str, captive: Captive, site: Site) -> None:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in captive.store.rglob("*") if path.is_file()}

    before = state()
    answer = site.answer(HOSTILE[name](captive.rounds[3]))
    assert code_of(answer) == "message"
    assert answer.data == b""
    assert state() == before
    assert sorted(path.name for path in captive.state_dir.iterdir()) == ["test"]


@pytest.mark.parametrize("changed", [{"protocol": 2}, {"federation_id": "other"}, {"config_sha256": "0"}, {"x": 1}])
def test_a_greeting_of_another_federation_is_refused(changed: dict[str, Any], captive: Captive, site: Site) -> None:
    assert code_of(site.answer(edited(captive.hello, **changed))) == "message"
    assert code_of(site.answer(captive.hello)) is None


def test_a_state_that_is_not_here_is_told(captive: Captive, site: Site) -> None:
    assert code_of(site.answer(edited(captive.rounds[3], round_num=9, personal_round=8))) == "lost-state"


def test_an_old_message_that_comes_again_takes_no_later_b_away(captive: Captive, tmp_path: Path) -> None:
    shutil.copytree(captive.store, tmp_path / "test" / CLIENT)
    before = (tmp_path / "test" / CLIENT / "round-000003" / "personal.safetensors").read_bytes()
    site = site_of(captive.config, CLIENT, captive.files[CLIENT], tmp_path)
    assert code_of(site.answer(captive.rounds[1])) is None
    assert (tmp_path / "test" / CLIENT / "round-000003" / "personal.safetensors").read_bytes() == before


def test_a_question_asked_twice_and_by_another_process_has_the_same_answer(captive: Captive, tmp_path: Path) -> None:
    shutil.copytree(captive.store, tmp_path / "test" / CLIENT)
    sent = [one for node, way, one in captive.exchange.sent if node == 1 and way == "up"][3]
    site = site_of(captive.config, CLIENT, captive.files[CLIENT], tmp_path)
    assert facts(sent)["round_num"] == 3
    assert site.answer(captive.rounds[3]) == sent
    assert site.answer(captive.rounds[3]) == sent


def test_the_state_of_another_rank_is_named(captive: Captive, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sfedlora.flower.site_store import SiteStore

    store = SiteStore.at(tmp_path, "test", CLIENT)
    store.save(2, {"x": torch.ones(2)}, {})
    site = site_of(captive.config, CLIENT, captive.files[CLIENT], tmp_path)
    assert code_of(site.answer(captive.rounds[3])) == "state"
    assert "is the state of another model, method or rank" in caplog.text


SECRET = "patients-of-doctor-grey"
ERRORS: dict[str, tuple[BaseException, str]] = {
    "client": (ClientError(SECRET, client_id="a", round_num=1, stage="training"), "training"),
    "NaN": (ClientError(f"NaN in {SECRET}", client_id="a", round_num=1, stage="training"), "diverged"),
    "memory": (MemoryError(SECRET), "memory"),
    "cuda memory": (torch.OutOfMemoryError(f"CUDA out of memory {SECRET}"), "memory"),
    "data": (DataError(SECRET), "data"),
    "model": (ModelError(SECRET), "model"),
    "state": (StorageError(SECRET), "state"),
    "runtime": (RuntimeError(SECRET), "internal"),
    "file": (FileNotFoundError(2, "No such file", f"/home/ann/{SECRET}"), "internal"),
    "unicode": (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), "internal"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_text_of_an_error_stays_at_the_site(
    name: str, captive: Captive, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, code = ERRORS[name]

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(site_module, "_state_of", failing)
    with caplog.at_level(logging.ERROR):
        answer = site.answer(captive.rounds[3])
    assert answer == Envelope(f'{{"kind":"failure","code":"{code}"}}')
    assert SECRET in caplog.text


def test_no_file_of_the_server_has_the_text_of_a_site_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, rounds__num_rounds=2)
    exchange = exchange_of(config, small_files(tmp_path), tmp_path / "sites")
    honest, lines = site_module._train, list[str]()

    def failing(federation: Any, state: Any, client_id: str) -> Any:
        if client_id == CLIENT:
            raise RuntimeError(f"/home/ann/{SECRET}.csv, line 7: Mr Brown has the flu")
        return honest(federation, state, client_id)

    monkeypatch.setattr(site_module, "_train", failing)
    path = serve(config, exchange, resume=False, log=lines.append).path
    content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    content += "\n".join(lines).encode() + b"".join(map(on_the_wire, (one for *_, one in exchange.sent)))
    assert b"'internal'" in content
    for text in (SECRET, "Brown", "home/ann"):
        assert text.encode() not in content
