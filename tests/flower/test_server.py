"""A federation across sites against the serial runner on one machine: the same bytes for every kind of method.

The sites are real: their own files, their own base model, their own folder for B. Only the transport is in process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flower.federations import chat_config, chat_files, exchange_of
from flower.local_exchange import LocalExchange, facts
from sfedlora import RunConfig, run
from sfedlora.flower.server import serve
from support.sentiment import write_sentiment

FILES = ("adapter_model.safetensors", "adapter_config.json")
SECONDS = {"train_seconds", "aggregate_seconds", "eval_seconds"}
METHODS: dict[str, dict[str, Any]] = {
    "sfed": {},
    "local-init": {"lora__init": "local"},
    "ffa": {"method__name": "ffa", "lora__scaling": "lora", "lora__init": "shared"},
    "rolora": {"method__name": "rolora", "lora__scaling": "lora", "lora__init": "shared"},
    "flora": {"method__name": "flora", "lora__scaling": "lora"},
    "fedex": {"method__name": "fedex", "lora__scaling": "lora"},
    "flexlora-ranks": {"method__name": "flexlora", "lora__scaling": "rslora", "lora__rank": [2, 4, 3]},
    "fedsa-ranks": {"lora__rank": [2, 4, 3]},
    "flora-ranks": {"method__name": "flora", "lora__scaling": "lora", "lora__rank": [2, 4, 3]},
    "local": {"method__name": "local", "lora__scaling": "rslora", "lora__init": "independent"},
    "local-shared": {"method__name": "local", "lora__scaling": "rslora", "lora__init": "shared"},
    "moments-and-yogi": {"local__optimizer_state": "keep", "rounds__server_optimizer": "fedyogi"},
    "cohort": {"rounds__cohort_size": 2, "rounds__weighting": "uniform", "evaluation__clients": "cohort"},
}


def _served(config: RunConfig, exchange: LocalExchange, tmp_path: Path) -> Path:
    lines: list[str] = []
    return serve(
        config.with_values({"output": str(tmp_path / "server")}), exchange, resume=False, log=lines.append
    ).path


def _same_adapters(local: Path, server: Path, state_dir: Path) -> list[str]:
    """Names of files that differ between a local run and a server with its sites."""
    pairs = [(local / "adapters" / "shared", server / "adapters" / "shared")]
    for folder in sorted((local / "adapters" / "clients").iterdir()):
        pairs.append((folder, state_dir / folder.name / "test" / folder.name / "adapter"))
    return [f"{b}/{name}" for a, b in pairs for name in FILES if (a / name).read_bytes() != (b / name).read_bytes()]


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: one for key, one in line.items() if key not in SECONDS | {"bytes_down", "clients"}} for line in lines]


def _summary(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    for one in (content[key] for key in ("initial", "last", "best")):
        for split in ("validation", "test"):
            one[split].pop("clients", None)  # a server writes them with flower.metrics: per-client only
    return {key: content[key] for key in ("initial", "last", "best")}


def _assert_close(found: Any, expected: Any) -> None:
    """Equal, numbers to rounding: where all clients serve one model, a local run evaluates them in common batches."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            _assert_close(a, b)
    else:
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", METHODS)
def test_server_and_sites_give_the_bytes_of_the_serial_runner(name: str, tmp_path: Path) -> None:
    config = chat_config(tmp_path, **METHODS[name])
    local = run(config).run_dir
    exchange = exchange_of(config, chat_files(tmp_path), tmp_path / "sites")
    server = _served(config, exchange, tmp_path)
    assert _same_adapters(local, server, tmp_path / "sites") == []
    _assert_close(_metrics(server), _metrics(local))
    _assert_close(_summary(server), _summary(local))


def test_sites_with_heads_of_their_own_give_the_bytes_of_the_serial_runner(tmp_path: Path) -> None:
    path = write_sentiment(tmp_path, runner="serial", threads=1, flower={"federation_id": "test"})
    values = yaml.safe_load(path.read_text())
    values["data"]["labels"] = ["negative", "positive"]
    config = RunConfig.from_mapping(values)
    local = run(config).run_dir
    rows = [json.loads(line) for line in Path(config.data.source).read_text().splitlines()]
    clients = json.loads((local / "partition.json").read_text())["clients"]
    files = {}
    for client_id, own in clients.items():
        files[client_id] = tmp_path / f"site-{client_id}.jsonl"
        numbers = sorted([*own["train"], *own["validation"], *own["test"]])
        files[client_id].write_text("\n".join(json.dumps(rows[number]) for number in numbers) + "\n")
    server = _served(config, exchange_of(config, files, tmp_path / "sites"), tmp_path)
    assert _same_adapters(local, server, tmp_path / "sites") == []
    assert _metrics(server) == _metrics(local)


def test_a_node_gets_one_message_a_round_and_one_or_two_at_the_end(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    exchange = exchange_of(config, chat_files(tmp_path), tmp_path / "sites")
    _served(config, exchange, tmp_path)
    for node in exchange.connected:
        asked = [facts(envelope) for to, way, envelope in exchange.sent if to == node and way == "down"]
        assert [one["kind"] for one in asked][:4] == ["hello", "round", "round", "round"]
        assert len(asked) in {5, 6}
        assert [one["train"] for one in asked[1:]] == [True, True, True, *[False] * (len(asked) - 4)]
