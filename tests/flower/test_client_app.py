"""The app that Flower runs at a site: whatever happens there, an answer without text of the site's comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower.federations import chat_config, chat_files
from flower.local_exchange import facts
from sfedlora.flower import client_app, trainer
from sfedlora.flower.client_app import make_client_app
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.protocol import PROTOCOL, HelloRequest, config_digest, open_failure, seal
from sfedlora.flower.records import from_records, to_records
from sfedlora.flower.settings import app_config

SECRET = "patients-of-doctor-grey"


pytestmark = pytest.mark.usefixtures("flower_process")


@pytest.fixture(autouse=True)
def _new_process() -> None:
    """No site of another test."""
    client_app._site.cache_clear()


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(chat_config(tmp_path).dump())
    return path


def call(config_path: Path, node: dict[str, Any], content: RecordDict, kind: str = "query", **run: Any) -> RecordDict:
    context = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=run)
    return make_client_app(config_path)(Message(content, 7, kind), context).content


def node_of(tmp_path: Path, **changed: Any) -> dict[str, Any]:
    [path] = chat_files(tmp_path, ("ai",)).values()
    given = {"client-id": "ai", "data": str(path), "state-dir": str(tmp_path / SECRET), "trainer": "none"}
    return {**given, **changed}


def hello(config_path: Path) -> RecordDict:
    config = app_config(config_path, {})
    digest = config_digest(config)
    return to_records(seal(HelloRequest(protocol=PROTOCOL, federation_id="test", config_sha256=digest)))


def test_a_site_says_who_it_is(config_path: Path, tmp_path: Path) -> None:
    found = facts(from_records(call(config_path, node_of(tmp_path), hello(config_path))))
    assert (found["kind"], found["client_id"]) == ("hello-reply", "ai")


@pytest.mark.parametrize("seed", [1, 2])
def test_another_configuration_is_refused(seed: int, config_path: Path, tmp_path: Path) -> None:
    answer = call(config_path, node_of(tmp_path), hello(config_path), overrides=f"seed={seed}")
    failure = open_failure(from_records(answer))
    assert failure is not None
    assert failure.code == "message"


NODES: dict[str, tuple[dict[str, Any], str]] = {
    "a file that is not there": ({"data": f"/{SECRET}.jsonl"}, "data"),
    "a column that is not there": ({"columns": f"prompt={SECRET}"}, "data"),
    "a model that is not there": ({"model": f"/{SECRET}"}, "model"),
    "an unknown key": ({SECRET: "x"}, "settings"),
    "a device that is not there": ({"device": SECRET}, "settings"),
}


@pytest.mark.parametrize("name", NODES)
def test_what_fails_at_a_site_is_told_by_a_code_alone(
    name: str, config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    changed, code = NODES[name]
    answer = call(config_path, node_of(tmp_path, **changed), hello(config_path))
    assert from_records(answer) == Envelope(f'{{"kind":"failure","code":"{code}"}}')
    assert SECRET in capsys.readouterr().out + caplog.text  # the site's own log says what


def test_an_error_that_nobody_expects_is_told_by_a_code_alone(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(settings: str, envelope: Envelope) -> Envelope:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(trainer, "ask_trainer", broken)
    answer = call(config_path, node_of(tmp_path, trainer="process"), hello(config_path))
    assert from_records(answer) == Envelope('{"kind":"failure","code":"internal"}')
    assert SECRET in capsys.readouterr().out


def test_a_simulated_node_of_no_client_is_told_by_a_code_alone(config_path: Path) -> None:
    node = {"partition-id": SECRET, "num-partitions": 3}
    answer = call(config_path, node, hello(config_path))
    assert from_records(answer) == Envelope('{"kind":"failure","code":"internal"}')


@pytest.mark.parametrize("kind", ["query", "train"])
def test_records_of_another_kind_are_refused(kind: str, config_path: Path, tmp_path: Path) -> None:
    answer = call(config_path, node_of(tmp_path), RecordDict({"x": ConfigRecord({"facts": "{}"})}), kind)
    assert from_records(answer) == Envelope('{"kind":"failure","code":"message"}')


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind":"hello"}', '{"kind":[]}', "[" * 100_000, '{"kind":"round"}'])
def test_facts_of_another_kind_are_refused(text: str, config_path: Path, tmp_path: Path) -> None:
    answer = call(config_path, node_of(tmp_path), to_records(Envelope(text)))
    assert from_records(answer) == Envelope('{"kind":"failure","code":"message"}')
