"""A site's B on its disk: only its owner's, whole or refused, and never another round's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sfedlora.errors import StorageError
from sfedlora.flower.site_store import SiteStore

PERSONAL = {"b:x": torch.arange(6.0).reshape(3, 2)}
MOMENTS = {"m:b:x": torch.ones(3, 2)}


@pytest.fixture(params=[0o000, 0o022, 0o077])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    own = SiteStore.at(tmp_path, "federation", "client")
    for round_num in (1, 2, 3):
        own.save(round_num, {"b:x": PERSONAL["b:x"] + round_num}, MOMENTS)
    return own


@pytest.mark.usefixtures("_umask")
def test_nobody_else_can_read_or_write_whatever_the_umask(tmp_path: Path) -> None:
    store = SiteStore.at(tmp_path / "state", "federation", "client")
    store.save(1, PERSONAL, MOMENTS)
    found = [store.path.parent, *store.path.parent.rglob("*")]
    assert len(found) == 6
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_folder_that_others_could_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "federation" / "client").mkdir(parents=True, mode=0o755)
    assert SiteStore.at(tmp_path, "federation", "client").path.stat().st_mode & 0o777 == 0o700


def test_what_was_saved_comes_back(store: SiteStore) -> None:
    personal, moments = store.load(2)
    assert torch.equal(personal["b:x"], PERSONAL["b:x"] + 2)
    assert torch.equal(moments["m:b:x"], MOMENTS["m:b:x"])
    store.save(2, PERSONAL, {})
    personal, moments = store.load(2)
    assert torch.equal(personal["b:x"], PERSONAL["b:x"])
    assert moments == {}


def test_the_rounds_asked_for_stay_and_older_ones_go(store: SiteStore) -> None:
    store.keep({3, 1})
    assert store.rounds() == [1, 3]


def test_a_late_message_of_an_old_round_takes_nothing_from_later_ones(store: SiteStore) -> None:
    store.keep({2, 0})
    assert store.rounds() == [2, 3]


def test_nothing_to_keep_removes_nothing(store: SiteStore) -> None:
    store.keep(())
    assert store.rounds() == [1, 2, 3]


def test_what_a_killed_process_left_goes_and_what_is_whole_stays(store: SiteStore) -> None:
    shutil.copytree(store.path / "round-000001", store.path / ".round-000001.tmp")
    (store.path / ".noise.key.tmp").write_bytes(b"half")
    before = {path: path.read_bytes() for path in store.path.glob("[!.]*/*")}
    store.remove_leftovers()
    assert {path.name for path in store.path.iterdir()} == {"round-000001", "round-000002", "round-000003"}
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _swap_round(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("round-000002"), folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda folder: _flip(folder / "personal.safetensors"), "personal.safetensors: damaged"),
    "short file": (lambda folder: os.truncate(folder / "personal.safetensors", 9), "personal.safetensors: damaged"),
    "no B": (lambda folder: (folder / "personal.safetensors").unlink(), "personal.safetensors: cannot be read"),
    "no moments": (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors: cannot be read"),
    "no facts": (lambda folder: (folder / "state.json").unlink(), "state.json: cannot be read"),
    "facts of another kind": (lambda folder: (folder / "state.json").write_text("[]"), "expected a JSON object"),
    "facts that are no JSON": (lambda folder: (folder / "state.json").write_text("{"), "not valid JSON"),
    "no digests": (lambda folder: (folder / "state.json").write_text('{"round_num": 3}'), "sha256.personal is missing"),
    "another round": (_swap_round, "holds the state after round 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, store: SiteStore) -> None:
    damage, message = DAMAGES[name]
    damage(store.path / "round-000003")
    with pytest.raises(StorageError, match=message):
        store.load(3)
    store.load(2)


def test_a_round_that_is_not_there_is_named(store: SiteStore) -> None:
    with pytest.raises(StorageError, match="round-000009"):
        store.load(9)


@pytest.mark.parametrize("name", ["..", ".", "../../x", "/etc", "a/b", "", "x" * 5000, "a\0b", "~", "A", "con"])
def test_no_name_leads_out_of_the_state_directory(name: str, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    for federation_id, client_id in ((name, "client"), ("federation", name), (name, name)):
        path = SiteStore.at(state_dir, federation_id, client_id).path
        assert path.resolve().parent.parent == state_dir.resolve()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("planted", ["federation", "federation/client"])
def test_a_link_in_place_of_a_folder_is_refused(planted: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "public"
    elsewhere.mkdir(mode=0o755)
    path = tmp_path / "state" / planted
    path.parent.mkdir(parents=True)
    path.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="a link"):
        SiteStore.at(tmp_path / "state", "federation", "client")
    assert list(elsewhere.iterdir()) == []
    assert elsewhere.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("planted", ["round-000001", ".round-000001.tmp"])
def test_b_is_not_written_through_a_planted_link(planted: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "public"
    elsewhere.mkdir()
    store = SiteStore.at(tmp_path / "state", "federation", "client")
    (store.path / planted).symlink_to(elsewhere)
    store.save(1, PERSONAL, MOMENTS)  # the link is replaced
    assert list(elsewhere.iterdir()) == []
    assert not (store.path / "round-000001").is_symlink()
    assert set(store.load(1)[0]) == set(PERSONAL)


def test_a_file_in_place_of_the_state_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        SiteStore.at(tmp_path / "state", "federation", "client")
