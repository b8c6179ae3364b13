"""What storage refuses: links in its way, permissions wider than asked for, headers that claim more than there is."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sfedlora.errors import StorageError
from sfedlora.storage import (
    add_file,
    append_line,
    directory_written_whole,
    make_directory,
    read_tensors,
    remove_tree,
    to_safetensors,
    write_bytes,
)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0, 0o022, 0o277])
def test_private_files_and_folders_are_their_owners_alone(mask: int, tmp_path: Path) -> None:
    folder, whole = tmp_path / "private", tmp_path / "whole"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with umask(mask):
        make_directory(folder, private=True)
        make_directory(tmp_path / "open", private=True)
        write_bytes(folder / "a", b"x", private=True)
        with directory_written_whole(whole, private=True) as inside:
            add_file(inside / "b", b"x", private=True)
    assert [mode(path) for path in (folder, whole, tmp_path / "open")] == [0o700] * 3
    assert [mode(path) for path in (folder / "a", whole / "b")] == [0o600] * 2


def test_other_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    with umask(0o027):
        write_bytes(tmp_path / "a", b"x")
        append_line(tmp_path / "b", "x")
        make_directory(tmp_path / "c")
    assert [mode(tmp_path / name) for name in "abc"] == [0o640, 0o640, 0o750]


def test_links_are_replaced_or_refused_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine", encoding="utf-8")
    for name in (".state.tmp", "state", "metrics"):
        (tmp_path / name).symlink_to(precious / "file")
    write_bytes(tmp_path / "state", b"new")
    assert not (tmp_path / "state").is_symlink()
    with pytest.raises(StorageError, match="cannot be written"):
        append_line(tmp_path / "metrics", "line")
    (tmp_path / ".round.tmp").symlink_to(precious)
    with directory_written_whole(tmp_path / "round") as folder:
        add_file(folder / "file", b"new")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(precious)
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert (precious / "file").read_text(encoding="utf-8") == "mine"


def _header(**entry: object) -> bytes:
    raw = json.dumps({"x": entry}).encode()
    return len(raw).to_bytes(8, "little") + raw


CLAIMS = {
    "terabytes": _header(dtype="F32", shape=[1 << 40], data_offsets=[0, 4 << 40]),
    "more than 64 bits": _header(dtype="F32", shape=[1 << 62, 1 << 62], data_offsets=[0, 1 << 62]),
    "a header of exabytes": (1 << 62).to_bytes(8, "little") + b"{}",
    "a header of all the file": (40).to_bytes(8, "little") + b" " * 39,
    "another type": _header(dtype="F7", shape=[1], data_offsets=[0, 4]) + bytes(4),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_more_than_there_is_allocates_nothing(claim: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(CLAIMS[claim])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StorageError, match=r"t\.safetensors: damaged safetensors file \("):
        read_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024, "kilobytes"


def test_a_tensor_without_values_allocates_nothing_whatever_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(_header(dtype="F32", shape=[0, 1 << 62], data_offsets=[0, 0]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_tensors(path)["x"].numel() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024, "kilobytes"


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(to_safetensors({"x": torch.ones(2)}))
    assert read_tensors(path)["x"].tolist() == [1.0, 1.0]
    with path.open("wb") as file:
        file.write((1 << 26).to_bytes(8, "little") + b"{")
        file.truncate(8 + (1 << 26))
    with pytest.raises(StorageError, match=r"damaged safetensors file \(a header of 67108864 bytes"):
        read_tensors(path)
