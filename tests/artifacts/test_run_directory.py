"""The run directory as an owner of files: checkpoints kept and dropped, odd client ids, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfedlora.artifacts import Checkpoint, CheckpointWriter, RunDirectory, load_partial, save_partial
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


@pytest.fixture
def writer(directory: RunDirectory) -> CheckpointWriter:
    return CheckpointWriter(directory.checkpoints)


def test_a_checkpoint_comes_back(directory: RunDirectory, writer: CheckpointWriter) -> None:
    stored = writer.save(_checkpoint(1, a=1.5), changed=CLIENTS, best_round=None)
    loaded = directory.checkpoints.load(1)
    assert loaded.progress == _progress(1)
    for state in (stored, loaded.state):
        assert state.server.round_num == 1
        assert state.server.shared["a:x"].tolist() == [1.0, 1.0]
        assert state.server.extra["moment"].tolist() == [1.0]
        assert sorted(state.personal) == sorted(CLIENTS)
        assert state.personal["a"]["b:x"].tolist() == [1.5]
        assert {key: value["b/exp_avg"].tolist() for key, value in state.optimizer.items()} == {"a": [2.5]}
    folders = {str(path.parent.relative_to(directory.path)) for path in directory.path.rglob("*.safetensors")}
    assert folders == {
        "checkpoints/round-000001", "checkpoints/personal/000001", "checkpoints/optimizer/000001"
    }, "no client id leaves its folder"  # fmt: skip


def test_the_last_two_and_the_best_are_kept(directory: RunDirectory, writer: CheckpointWriter) -> None:
    for round_num in range(7):
        writer.save(_checkpoint(round_num), changed=CLIENTS, best_round=2 if round_num > 1 else None)
    assert directory.checkpoints.rounds() == [2, 5, 6]


def test_partial_outcomes_are_those_of_the_asked_round(directory: RunDirectory) -> None:
    outcome = ClientOutcome(
        "../b", 3, 17, {"b:x": torch.ones(2)}, {"b/step": torch.tensor(4.0)}, TrainMetrics(1.5, None, 0.25, 10, 2, 4)
    )
    checkpoints = directory.checkpoints.path
    save_partial(checkpoints, {"../b": outcome})
    assert load_partial(checkpoints, 2) == {}
    loaded = load_partial(checkpoints, 3)["../b"]
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
    "checkpoints/round-000001/clients.json": (
        '{"personal": {"a": [1]}, "optimizer": {}}',
        r"clients\.json: damaged: its content is not what was written",
    ),
    "checkpoints/partial/a.json": (
        '{"client_id": "a", "round_num": "2"}',
        r"partial/a\.json: .*round_num is str",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_what_it_lacks(
    name: str, directory: RunDirectory, writer: CheckpointWriter
) -> None:
    content, message = DAMAGED[name]
    writer.save(_checkpoint(1), changed=CLIENTS, best_round=None)
    (directory.path / "checkpoints" / "partial").mkdir()
    (directory.path / name).write_text(content, encoding="utf-8")
    readers: dict[str, Callable[[], object]] = {
        "partition.json": directory.partition,
        "environment.json": directory.environment,
        "summary.json": directory.summary,
        "metrics.jsonl": directory.metrics,
        "checkpoints/round-000001/state.json": lambda: directory.checkpoints.load(1),
        "checkpoints/round-000001/clients.json": lambda: directory.checkpoints.load(1),
        "checkpoints/partial/a.json": lambda: load_partial(directory.checkpoints.path, 2),
    }
    with pytest.raises(StorageError, match=message):
        readers[name]()


def test_a_state_without_progress_and_a_folder_that_is_no_checkpoint(
    directory: RunDirectory, writer: CheckpointWriter
) -> None:
    writer.save(_checkpoint(1), changed=CLIENTS, best_round=None)
    path = directory.path / "checkpoints" / "round-000001" / "state.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "progress": {}}), encoding="utf-8")
    with pytest.raises(StorageError, match=r"progress\.initial is missing"):
        directory.checkpoints.load(1)
    (directory.path / "checkpoints" / "round-x").mkdir()
    with pytest.raises(StorageError, match="round-x: no checkpoint"):
        directory.checkpoints.rounds()


@pytest.mark.parametrize("part", ["state.json", "server.safetensors", "clients.json"])
def test_a_checkpoint_that_lacks_a_part_is_named(part: str, directory: RunDirectory, writer: CheckpointWriter) -> None:
    writer.save(_checkpoint(1), changed=CLIENTS, best_round=None)
    (directory.path / "checkpoints" / "round-000001" / part).unlink()
    with pytest.raises(StorageError, match=f"{part}: cannot be read"):
        directory.checkpoints.load(1)


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
