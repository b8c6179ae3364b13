"""The run directory as an owner of files: checkpoints kept and dropped, links, odd client ids, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfedlora.artifacts import Checkpoint, RunDirectory
from sfedlora.errors import ConfigError, InputError, StorageError
from sfedlora.federation.client import ClientOutcome, TrainMetrics
from sfedlora.federation.state import FederationState
from sfedlora.types import ServerState

CLIENTS = ["a", "../b", "Ä/ö", "CON", ""]


def _progress(best_round: int) -> dict[str, Any]:
    return {"initial": {}, "best_round": best_round, "best_loss": 0.5}


def _checkpoint(round_num: int, **values: float) -> Checkpoint:
    personal = {client: {"b:x": torch.tensor([values.get(client, 0.0)])} for client in CLIENTS}
    server = ServerState(round_num, {"a:x": torch.full((2,), float(round_num))}, {"moment": torch.ones(1)})
    optimizer = {"a": {"b/exp_avg": torch.tensor([2.5])}}
    return Checkpoint(FederationState(server, personal, optimizer), _progress(round_num))


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def test_a_checkpoint_comes_back(directory: RunDirectory) -> None:
    directory.save_checkpoint(_checkpoint(1, a=1.5), changed=CLIENTS, best_round=None)
    loaded = directory.load_checkpoint(1)
    assert loaded.progress == _progress(1)
    assert loaded.state.server.round_num == 1
    assert loaded.state.server.shared["a:x"].tolist() == [1.0, 1.0]
    assert loaded.state.server.extra["moment"].tolist() == [1.0]
    assert list(loaded.state.personal) == CLIENTS
    assert loaded.state.personal["a"]["b:x"].tolist() == [1.5]
    assert {key: value["b/exp_avg"].tolist() for key, value in loaded.state.optimizer.items()} == {"a": [2.5]}
    files = {path.parent.name for path in directory.path.rglob("*.safetensors")}
    assert files == {"round-000001", "clients"}, "no client id leaves its folder"


def test_the_last_two_and_the_best_are_kept(directory: RunDirectory) -> None:
    for round_num in range(7):
        directory.save_checkpoint(_checkpoint(round_num), changed=CLIENTS, best_round=2 if round_num > 1 else None)
    assert directory.rounds_kept() == [2, 5, 6]


def test_a_client_that_did_not_change_is_a_link_that_outlives_the_old_round(directory: RunDirectory) -> None:
    directory.save_checkpoint(_checkpoint(1, a=1.0), changed=CLIENTS, best_round=None)
    for round_num in (2, 3, 4):
        directory.save_checkpoint(_checkpoint(round_num, a=float(round_num)), changed=["../b"], best_round=None)
    assert directory.rounds_kept() == [3, 4]
    assert directory.load_checkpoint(4).state.personal["a"]["b:x"].tolist() == [1.0], "the link is to what was stored"
    inodes = {(directory.path / f"checkpoints/round-{n:06d}/clients/a.safetensors").stat().st_ino for n in (3, 4)}
    assert len(inodes) == 1


def test_partial_outcomes_are_those_of_the_asked_round(directory: RunDirectory) -> None:
    outcome = ClientOutcome(
        "../b", 3, 17, {"b:x": torch.ones(2)}, {"b/step": torch.tensor(4.0)}, TrainMetrics(1.5, None, 0.25, 10, 2, 4)
    )
    directory.save_partial({"../b": outcome})
    assert directory.load_partial(2) == {}
    loaded = directory.load_partial(3)["../b"]
    assert (loaded.client_id, loaded.round_num, loaded.num_examples, loaded.metrics) == ("../b", 3, 17, outcome.metrics)
    assert loaded.tensors["b:x"].tolist() == [1.0, 1.0]
    assert loaded.optimizer_state["b/step"].item() == 4.0


def test_metrics_are_appended_dropped_and_repaired(directory: RunDirectory) -> None:
    for round_num in (1, 2, 3):
        directory.append_metrics({"round_num": round_num, "loss": float("nan")})
    with (directory.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round_num": 4')
    assert directory.metrics() == [{"round_num": number, "loss": None} for number in (1, 2, 3)]
    directory.drop_metrics_after(2)
    assert (directory.path / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 2
    (directory.path / "metrics.jsonl").write_text("{torn\n{}\n", encoding="utf-8")
    with pytest.raises(StorageError, match=r"metrics\.jsonl, line 1: not valid JSON"):
        directory.metrics()


def test_a_metrics_line_torn_inside_a_character_is_left_out(directory: RunDirectory) -> None:
    directory.append_metrics({"round_num": 1, "cohort": ["Zürich"]})
    whole = (directory.path / "metrics.jsonl").read_bytes()
    torn = whole[: whole.index("ü".encode()) + 1]
    (directory.path / "metrics.jsonl").write_bytes(whole + torn)
    assert directory.metrics() == [{"round_num": 1, "cohort": ["Zürich"]}]
    directory.drop_metrics_after(1)
    assert (directory.path / "metrics.jsonl").read_bytes() == whole
    (directory.path / "metrics.jsonl").write_bytes(whole + torn + b"\n")
    with pytest.raises(StorageError, match=r"line 2: not valid JSON"):
        directory.metrics()


DAMAGED = {
    "partition.json": ("{}", r"partition\.json: .*source_sha256 is missing"),
    "environment.json": (
        '{"base_model": {"sha256": "0"}, "scaling": 1}',
        r"environment\.json: .*scaling\.gamma is missing",
    ),
    "summary.json": ('{"a": 1}', r"summary\.json: .*initial\.validation\.weighted is missing"),
    "metrics.jsonl": ("1\n", r"metrics\.jsonl, line 1: .*expected a JSON object, found int"),
    "checkpoints/round-000001/state.json": ("{}", r"round-000001/state\.json: .*round_num is missing"),
    "checkpoints/partial/a.json": (
        '{"client_id": "a", "round_num": "2"}',
        r"partial/a\.json: .*round_num is str",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_what_it_lacks(name: str, directory: RunDirectory) -> None:
    content, message = DAMAGED[name]
    directory.save_checkpoint(_checkpoint(1), changed=CLIENTS, best_round=None)
    (directory.path / "checkpoints" / "partial").mkdir()
    (directory.path / name).write_text(content, encoding="utf-8")
    readers: dict[str, Callable[[], object]] = {
        "partition.json": directory.partition,
        "environment.json": directory.environment,
        "summary.json": directory.summary,
        "metrics.jsonl": directory.metrics,
        "checkpoints/round-000001/state.json": lambda: directory.load_checkpoint(1),
        "checkpoints/partial/a.json": lambda: directory.load_partial(2),
    }
    with pytest.raises(StorageError, match=message):
        readers[name]()


def test_a_state_without_progress_and_a_folder_that_is_no_checkpoint(directory: RunDirectory) -> None:
    directory.save_checkpoint(_checkpoint(1), changed=CLIENTS, best_round=None)
    path = directory.path / "checkpoints" / "round-000001" / "state.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "progress": {}}), encoding="utf-8")
    with pytest.raises(StorageError, match=r"progress\.initial is missing"):
        directory.load_checkpoint(1)
    (directory.path / "checkpoints" / "round-x").mkdir()
    with pytest.raises(StorageError, match="round-x: no checkpoint"):
        directory.rounds_kept()


@pytest.mark.parametrize("part", ["state.json", "server.safetensors", "clients/a.safetensors"])
def test_a_checkpoint_that_lacks_a_part_is_named(part: str, directory: RunDirectory) -> None:
    directory.save_checkpoint(_checkpoint(1), changed=CLIENTS, best_round=None)
    (directory.path / "checkpoints" / "round-000001" / part).unlink()
    with pytest.raises(StorageError, match=f"{part}: cannot be read"):
        directory.load_checkpoint(1)


def test_a_free_path_is_new_or_empty(tmp_path: Path) -> None:
    RunDirectory.check_free(tmp_path / "new" / "deeper")
    RunDirectory.check_free(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "file" / "below", tmp_path / "dangling"):
        with pytest.raises(ConfigError, match=r"^output: "):
            RunDirectory.check_free(taken)
    with pytest.raises(ConfigError, match="cannot be used"):
        RunDirectory.check_free(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match=r"config\.yaml is missing"):
        RunDirectory.open(tmp_path)
