"""What an app and a node are started with: one clear message for whatever cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flower.federations import chat_config
from sfedlora.errors import ConfigError
from sfedlora.flower.protocol import config_digest
from sfedlora.flower.settings import app_config, site_settings

NODE = {"client-id": "a", "data": "/data/a.csv", "state-dir": "/state"}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(chat_config(tmp_path).dump())
    return path


def test_an_app_takes_overrides_and_output(config_path: Path) -> None:
    config = app_config(config_path, {"overrides": "seed=7 'flower.sites=[a, b]'", "output": "runs/[1", "resume": True})
    assert (config.seed, config.flower.sites, config.output) == (7, ("a", "b"), "runs/[1")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"overrides": "seed='1"}, "overrides=.*No closing quotation"),
        ({"overrides": "sed=1"}, "seed"),
        ({"overrides": "seed"}, "seed"),
        ({"overrides": "seed=-1"}, "seed"),
        ({"output": "a\0b"}, "output"),
    ],
)
def test_a_run_that_cannot_be_used_is_refused(run: dict[str, str], message: str, config_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        app_config(config_path, run)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        app_config(tmp_path / "nothing.yaml", {})


def test_a_node_brings_its_own_paths_and_changes_nothing_that_all_must_have_in_common(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    columns = "prompt=question , response=answer"
    settings = site_settings(config, {**NODE, "columns": columns, "device": "cpu", "model": "/models/m"})
    assert settings.config.data.source == "/data/a.csv"
    assert settings.config.data.columns == {"prompt": "question", "response": "answer"}
    assert (settings.config.model.source, settings.config.device) == ("/models/m", "cpu")
    assert settings.digest == config_digest(config) == config_digest(settings.config)
    assert (settings.client_id, settings.state_dir) == ("a", Path("/state"))


@pytest.mark.parametrize("key", ["seed", "lora.rank", "local.learning_rate", "flower.federation_id", "data.template"])
def test_the_digest_tells_configurations_apart(key: str, tmp_path: Path) -> None:
    values = {
        "seed": 1,
        "lora.rank": 3,
        "local.learning_rate": 1.0,
        "flower.federation_id": "x",
        "data.template": "alpaca",
    }
    config = chat_config(tmp_path)
    assert config_digest(config.with_values({key: values[key]})) != config_digest(config)


@pytest.mark.parametrize("client_id", [0, 7, "0", "Ann's site"])
def test_a_client_id_may_be_a_number(client_id: object, tmp_path: Path) -> None:
    assert site_settings(chat_config(tmp_path), {**NODE, "client-id": client_id}).client_id == str(client_id)


def test_a_simulated_node_plays_all_clients(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    settings = site_settings(config, {"num-partitions": 3, "partition-id": 1})
    assert settings.client_id is None
    assert settings.state_dir == Path(f"{config.output}-sites")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"dat": "x"}, "unknown key 'dat'; known keys: client-id, columns"),
    "no client id": ({"client-id": ""}, "client-id is missing"),
    "no data": ({"data": ""}, "data is missing"),
    "no state directory": ({"state-dir": ""}, "state-dir is missing"),
    "two lines": ({"client-id": "a\nb"}, "client-id="),
    "a long id": ({"client-id": "x" * 201}, "client-id="),
    "columns without =": ({"columns": "question"}, "columns='question'"),
    "columns without a name": ({"columns": "prompt="}, "columns='prompt='"),
    "columns of another role": ({"columns": "question=prompt"}, "question"),
    "device": ({"device": "tpu"}, "device"),
    "trainer": ({"trainer": "off"}, "trainer='off'; expected one of process, none"),
    "idle as text": ({"trainer-idle-seconds": "long"}, "trainer-idle-seconds='long'"),
    "idle of 0": ({"trainer-idle-seconds": 0}, "trainer-idle-seconds=0"),
    "idle for ever": ({"trainer-idle-seconds": float("inf")}, "trainer-idle-seconds=inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_node_that_cannot_be_used_is_refused(name: str, tmp_path: Path) -> None:
    values, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        site_settings(chat_config(tmp_path), {**NODE, **values})


@pytest.mark.parametrize("key", ["client-id", "data", "state-dir"])
def test_a_node_that_lacks_a_key_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing; start the node with --node-config"):
        site_settings(chat_config(tmp_path), {name: value for name, value in NODE.items() if name != key})
