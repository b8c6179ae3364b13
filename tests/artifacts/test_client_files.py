"""A client's file is immutable, read when it is asked for, and refused when it is not the one that was written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from sfedlora.artifacts.client_files import ClientFiles, check_files, path_of, with_written
from sfedlora.errors import StorageError
from sfedlora.types import Tensors
from support.full_disk import largest_file

ODD = {
    "b:x": torch.tensor([[0.0, -0.0], [1e-45, 3.4e38]]),
    "b:transposed": torch.arange(6.0).reshape(2, 3).T,
    "head:half": torch.tensor([math.pi], dtype=torch.bfloat16),
    "b/step": torch.tensor(7.0),
    "b/empty": torch.zeros(0, 4),
}


def written(folder: Path, round_num: int = 1, **values: float) -> ClientFiles:
    return with_written(ClientFiles(folder), round_num, _tensors(values))


def _tensors(values: Mapping[str, float]) -> dict[str, Tensors]:
    return {client_id: {"b:x": torch.full((3, 2), value)} for client_id, value in values.items()}


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    files = with_written(ClientFiles(tmp_path / "deep" / "personal"), 3, {"../Ä": ODD})
    (back,) = files.values()
    assert back.keys() == ODD.keys()
    for name, tensor in ODD.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["000003"]


def test_a_round_writes_its_own_clients_and_old_mappings_stay_as_they_were(tmp_path: Path) -> None:
    first = written(tmp_path, 1, a=1.0, b=2.0)
    before = path_of(first, "b").stat()
    second = with_written(first, 2, _tensors({"a": 10.0, "c": 30.0}))
    assert [float(second[client]["b:x"][0, 0]) for client in ("a", "b", "c")] == [10.0, 2.0, 30.0]
    assert [float(first[client]["b:x"][0, 0]) for client in ("a", "b")] == [1.0, 2.0]
    assert (list(first), len(second), "c" in first, "c" in second) == (["a", "b"], 3, False, True)
    assert path_of(second, "b").stat() == before
    with pytest.raises(KeyError):
        first["c"]
    assert first.get("c") is None


def test_what_is_read_is_not_kept_and_writing_to_it_changes_no_file(tmp_path: Path) -> None:
    files = written(tmp_path, a=1.0)
    files["a"]["b:x"].zero_()
    assert files["a"]["b:x"].eq(1.0).all()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_idle_clients_take_no_memory(tmp_path: Path) -> None:
    """64 clients of 1 MB: had they stayed in memory after they were read, it would show."""
    large = {"b:x": torch.ones(250_000)}
    files = with_written(ClientFiles(tmp_path), 1, {str(number): large for number in range(64)})
    files["0"]
    before = _anonymous_kilobytes()
    held = [files[client_id] for client_id in files]
    assert sum(float(tensors["b:x"].sum()) for tensors in held) == 64 * 250_000
    assert _anonymous_kilobytes() - before < 64 * 100


def _anonymous_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_a_client_without_tensors_has_no_file(tmp_path: Path) -> None:
    files = with_written(ClientFiles(tmp_path / "personal"), 1, {"a": {}})
    check_files(files)
    assert files["a"] == {}
    assert not (tmp_path / "personal").exists()


def _cut(path: Path, other: Path) -> None:
    del other
    path.write_bytes(path.read_bytes()[:-1])


def _replace(path: Path, other: Path) -> None:
    assert path.stat().st_size == other.stat().st_size, "or the size alone would tell"
    shutil.copy(other, path)


def _become_folder(path: Path, other: Path) -> None:
    del other
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda path, _: path.unlink(), "cannot be read"),
    "a folder": (_become_folder, "cannot be read"),
    "empty": (lambda path, _: path.write_bytes(b""), "damaged safetensors file"),
    "cut off": (_cut, "damaged safetensors file"),
    "longer": (lambda path, _: path.write_bytes(path.read_bytes() + b"\0"), "damaged safetensors file"),
    "no safetensors": (lambda path, _: path.write_bytes(b"x" * 200), "damaged safetensors file"),
    "replaced": (_replace, "one of another run, client or round"),
}


@pytest.mark.parametrize("origin", ["run", "client", "round"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_the_one_is_named_without_reading_it(damage: str, origin: str, tmp_path: Path) -> None:
    act, message = DAMAGES[damage]
    files = written(tmp_path / "run", 1, a=1.0, b=2.0)
    others = {
        "run": path_of(written(tmp_path / "other", 1, a=5.0), "a"),
        "client": path_of(files, "b"),
        "round": path_of(with_written(files, 2, _tensors({"a": 3.0})), "a"),
    }
    act(path_of(files, "a"), others[origin])
    for action in (lambda: check_files(files), lambda: files["a"]):
        with pytest.raises(StorageError, match=rf"{path_of(files, 'a')}: .*{message}"):
            action()
    assert files["b"]["b:x"].eq(2.0).all()


def test_a_flipped_bit_is_found_when_the_file_is_read(tmp_path: Path) -> None:
    files = written(tmp_path, a=1.0)
    content = bytearray(path_of(files, "a").read_bytes())
    content[-3] ^= 1
    path_of(files, "a").write_bytes(content)
    check_files(files)
    with pytest.raises(StorageError, match=r"a\.safetensors: damaged: its content is not what was written"):
        files["a"]


def test_a_round_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    files = written(tmp_path, 1, a=1.0)
    larger = {**_tensors({"a": 2.0}), "b": {"b:x": torch.zeros(1000)}}
    with largest_file(2000), pytest.raises(StorageError, match=r"000002: cannot be written .*free space"):
        with_written(files, 2, larger)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]
    assert with_written(files, 2, larger)["a"]["b:x"].eq(2.0).all()
