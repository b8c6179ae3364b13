"""Files are whole or not there: full disks (a limit on file size), torn files, hard links, strict JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from sfedlora.errors import StorageError
from sfedlora.storage import (
    add_file,
    append_line,
    directory_written_whole,
    read_json,
    read_tensors,
    to_json,
    write_bytes,
    write_json,
    write_tensors,
)
from support.full_disk import largest_file


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    write_bytes(path, b"old")
    with largest_file(1000), pytest.raises(StorageError, match=r"state\.bin: cannot be written .*free space"):
        write_bytes(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.bin"]  # noqa: PTH208 - names, hidden ones too


def _replace(path: Path, *, size: int, error: BaseException | None = None) -> None:
    with directory_written_whole(path) as folder:
        write_bytes(folder / "a", b"new")
        write_bytes(folder / "b", bytes(size))
        if error is not None:
            raise error


def test_a_folder_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "round"
    with directory_written_whole(path) as folder:
        (folder / "a").write_text("old", encoding="utf-8")
    with largest_file(1000), pytest.raises(StorageError):
        _replace(path, size=5000)
    with pytest.raises(KeyboardInterrupt):
        _replace(path, size=1, error=KeyboardInterrupt())
    assert {item.name: item.read_text(encoding="utf-8") for item in path.iterdir()} == {"a": "old"}
    assert [item.name for item in tmp_path.iterdir()] == ["round"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "round"
    for name in ("a", "b"):
        with directory_written_whole(path) as folder:
            (folder / name).touch()
    assert [item.name for item in path.iterdir()] == ["b"]


def test_a_folder_that_is_replaced_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever operation a process is ended at, the folder is the old one, the new one, or not there."""
    path, seen = tmp_path / "round", list[dict[str, str] | None]()

    def look(event: str, *_: object) -> None:
        if not event.startswith("sfedlora.storage."):
            return
        found = {item.name: item.read_text(encoding="utf-8") for item in path.glob("*")}
        seen.append(found if path.is_dir() else None)

    for text in ("old", "new"):
        with directory_written_whole(path) as folder:
            for name in ("a", "b", "c"):
                add_file(folder / name, text.encode())
            if text == "new":
                monkeypatch.setattr("sys.audit", look)
    old, new = (dict.fromkeys(("a", "b", "c"), text) for text in ("old", "new"))
    assert [one for number, one in enumerate(seen) if not number or one != seen[number - 1]] == [old, None, new]


def test_what_an_earlier_kill_left_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".round.tmp").mkdir()
    (tmp_path / ".round.tmp" / "torn").touch()
    (tmp_path / ".state.tmp").write_text("torn", encoding="utf-8")
    with directory_written_whole(tmp_path / "round") as folder:
        (folder / "a").touch()
    write_bytes(tmp_path / "state", b"whole")
    assert [item.name for item in (tmp_path / "round").iterdir()] == ["a"]
    assert {item.name for item in tmp_path.iterdir()} == {"round", "state"}


def test_a_line_that_does_not_fit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, "first")
    with largest_file(100), pytest.raises(StorageError, match="cannot be written"):
        append_line(path, "x" * 500)
    assert path.read_text(encoding="utf-8").startswith("first\n")


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([0.0, -0.0, 1e-45, math.inf, 3.4e38]),
        "step": torch.tensor(7.0),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b'{"a": 1}'])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(StorageError, match=r"t\.safetensors: damaged"):
        read_tensors(tmp_path / "t.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_tensors, read_json):
        with pytest.raises(StorageError, match=r"none: cannot be read"):
            read(tmp_path / "none")
    (tmp_path / "torn.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(StorageError, match="not valid JSON"):
        read_json(tmp_path / "torn.json")
    (tmp_path / "bytes.json").write_bytes(b'"\xff"')
    with pytest.raises(StorageError, match="not valid JSON"):
        read_json(tmp_path / "bytes.json")


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"nan": math.nan, "inf": [math.inf, -math.inf, 1.5], 3: ("ä", None, True)})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")

    def refuse(name: str) -> float:
        raise ValueError(name)

    content = json.loads(text, parse_constant=refuse)
    assert content == {"nan": None, "inf": [None, None, 1.5], "3": ["ä", None, True]}
    assert to_json({"a": 0.1}) == '{"a": 0.1}'
