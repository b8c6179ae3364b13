"""Checkpoints come back as they were saved, and hold on to exactly the client files that a kept round refers to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.artifacts import Checkpoint, Checkpoints, CheckpointWriter
from sfedlora.errors import StorageError
from sfedlora.federation.state import FederationState
from sfedlora.types import ServerState, Tensors
from support.full_disk import largest_file

IDS = ("a", "b", "../C")


def checkpoint(round_num: int, values: Mapping[str, float], moments: Mapping[str, float] | None = None) -> Checkpoint:
    def tensors(named: Mapping[str, float]) -> dict[str, Tensors]:
        return {client_id: {"b:x": torch.full((4,), value)} for client_id, value in named.items()}

    server = ServerState(round_num, {"a:x": torch.full((2,), float(round_num))}, {})
    progress: dict[str, Any] = {"initial": {}, "best_round": None, "best_loss": None}
    return Checkpoint(FederationState(server, tensors(values), tensors(moments or {})), progress)


def values_of(clients: Mapping[str, Tensors]) -> dict[str, float]:
    return {client_id: float(tensors["b:x"][0]) for client_id, tensors in clients.items()}


def files_of(path: Path, kind: str) -> set[str]:
    return {f"{file.parent.name}/{file.stem[0]}" for file in (path / kind).rglob("*.safetensors")}


ROUNDS = st.lists(
    st.tuples(
        st.sets(st.sampled_from(IDS)).map(sorted),  # who changes
        st.sets(st.sampled_from(IDS)).map(sorted),  # whose moments change, among them
        st.booleans(),  # a new best round
        st.booleans(),  # the process is killed after it, and another goes on
    ),
    min_size=1,
    max_size=7,
)


@settings(deadline=None, max_examples=20)
@given(rounds=ROUNDS)
def test_kept_rounds_come_back_and_nothing_else_stays(
    rounds: list[tuple[list[str], list[str], bool, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("checkpoints")
    writer = CheckpointWriter(Checkpoints(path))
    best, personal, optimizer = 0, {}, {}
    history: list[tuple[dict[str, float], dict[str, float]]] = []
    changed_in: dict[str, dict[str, list[int]]] = {"personal": {}, "optimizer": {}}
    for round_num, (changed, kept_moments, is_best, killed) in enumerate(rounds):
        best = round_num if is_best else best
        for client_id in changed:
            personal[client_id] = 100.0 * round_num + IDS.index(client_id)
            changed_in["personal"].setdefault(client_id, []).append(round_num)
            if client_id in kept_moments or client_id in optimizer:
                optimizer[client_id] = -personal[client_id]
                changed_in["optimizer"].setdefault(client_id, []).append(round_num)
        history.append((dict(personal), dict(optimizer)))
        stored = writer.save(checkpoint(round_num, personal, optimizer), changed=changed, best_round=best)
        assert (values_of(stored.personal), values_of(stored.optimizer)) == history[-1]

        kept = sorted({round_num, max(round_num - 1, 0), best})
        assert Checkpoints(path).rounds() == kept
        for number in kept:
            state = Checkpoints(path).load(number).state
            assert state.server.round_num == number
            assert (values_of(state.personal), values_of(state.optimizer)) == history[number]
        for kind, changes in changed_in.items():
            wanted = {
                f"{max(number for number in numbers if number <= round_kept):06d}/{client_id.strip('./').lower()}"
                for client_id, numbers in changes.items()
                for round_kept in kept
                if numbers[0] <= round_kept
            }
            assert files_of(path, kind) == wanted
            assert all(any(folder.iterdir()) for folder in path.glob(f"{kind}/*")), "no empty folder stays"
        if killed:
            Checkpoints(path).remove_leftovers()
            writer = CheckpointWriter(Checkpoints(path))


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    writer = CheckpointWriter(checkpoints)
    for round_num in (1, 2):
        writer.save(
            checkpoint(round_num, {"a": 1.0, "b": round_num}), changed=("a", "b")[2 - round_num :], best_round=None
        )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for left in (".round-000003.tmp/state.json", "personal/.000003.tmp/a.safetensors", "personal/000003/a.safetensors",
                 "optimizer/000003/a.safetensors", ".partial.tmp/a.json"):  # fmt: skip
        (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left).write_bytes(b"torn")
    checkpoints.remove_leftovers()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.rglob(".*"))
    assert not (tmp_path / "personal" / "000003").exists()


@pytest.mark.parametrize("limit", [300, 1200])
def test_a_round_that_does_not_fit_leaves_the_rounds_before(limit: int, tmp_path: Path) -> None:
    """At 300 bytes a client's file does not fit, at 1,200 the server's."""
    checkpoints = Checkpoints(tmp_path)
    writer = CheckpointWriter(checkpoints)
    for round_num in (1, 2):
        writer.save(checkpoint(round_num, {"a": round_num}), changed=["a"], best_round=1)
    third = checkpoint(3, {"a": 3.0})
    larger = ServerState(3, {"a:x": torch.zeros(1000)}, {})
    with largest_file(limit), pytest.raises(StorageError, match=r"cannot be written .*free space"):
        CheckpointWriter(checkpoints).save(
            Checkpoint(FederationState(larger, {"a": {"b:x": torch.zeros(50)}}, {}), third.progress),
            changed=["a"],
            best_round=1,
        )
    assert checkpoints.rounds() == [1, 2]
    assert [values_of(checkpoints.load(number).state.personal) for number in (1, 2)] == [{"a": 1.0}, {"a": 2.0}]
    CheckpointWriter(checkpoints).save(third, changed=["a"], best_round=1)
    assert values_of(checkpoints.load(3).state.personal) == {"a": 3.0}


def test_a_copy_of_the_folder_is_as_good(tmp_path: Path) -> None:
    CheckpointWriter(Checkpoints(tmp_path / "here")).save(checkpoint(1, {"a": 1.0}), changed=["a"], best_round=None)
    (tmp_path / "here").rename(tmp_path / "there")
    assert values_of(Checkpoints(tmp_path / "there").load(1).state.personal) == {"a": 1.0}


def test_only_changed_clients_are_read_from_the_state(tmp_path: Path) -> None:
    class Unreadable(dict[str, Tensors]):
        def __getitem__(self, key: str) -> Tensors:
            assert key == "a", "client b has not changed"
            return super().__getitem__(key)

    writer = CheckpointWriter(Checkpoints(tmp_path))
    writer.save(checkpoint(1, {"a": 1.0, "b": 2.0}), changed=["a", "b"], best_round=None)
    second = checkpoint(2, {"a": 3.0, "b": 4.0})
    state = FederationState(second.state.server, Unreadable(second.state.personal), {})
    stored = writer.save(Checkpoint(state, second.progress), changed=["a"], best_round=None)
    assert values_of(stored.personal) == {"a": 3.0, "b": 2.0}
