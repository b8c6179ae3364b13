"""The power loss of the crash tests: what was synced with its name stays, what was not goes; and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from crash.faults import Fault, Watch, watch
from crash.harness import Plan, campaign
from sfedlora.storage import append_line, make_directory, remove_file, write_bytes


class _PowerLostError(Exception):
    """In place of the end of the process."""


class _Stopped(Watch):
    """A watch that is told of operations by hand and ends with an exception."""

    def _end(self) -> None:
        if self._loss is not None:
            self._loss.lose()
        raise _PowerLostError


def _write_two(folder: Path) -> None:
    make_directory(folder)
    write_bytes(folder / "a", b"first of all")
    write_bytes(folder / "b", b"second")
    write_bytes(folder / "a", b"third")
    remove_file(folder / "b")


def _after_power_loss(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None] = _write_two
) -> dict[str, bytes] | None:
    """What is in a folder when power is lost before an operation; None: it is not there."""
    folder, backups = tmp_path / "run", tmp_path / "backups"
    backups.mkdir()
    hooks: list[Callable[[str, tuple[object, ...]], None]] = []
    monkeypatch.setattr("sys.addaudithook", hooks.append)
    monkeypatch.setattr("crash.faults.Watch", _Stopped)
    watch(Fault("operation", at, power_loss=True), folder, backups)
    monkeypatch.setattr("sys.audit", lambda event, *args: hooks[0](event, args))
    with pytest.raises(_PowerLostError):
        write(folder)
    if not folder.is_dir():
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FIRST, SECOND, THIRD = {"a": b"first of all"}, {"a": b"first of all", "b": b"second"}, {"a": b"third", "b": b"second"}
LEFT: Mapping[str, tuple[int, dict[str, bytes] | None]] = {
    "before anything": (0, None),
    "folder made, its name not synced": (1, None),
    "folder made and synced": (2, {}),
    "content written, not synced": (3, {}),
    "file renamed, folder not synced": (5, {}),
    "first file whole": (6, FIRST),
    "second renamed, not synced": (9, FIRST),
    "second whole": (10, SECOND),
    "third renamed, not synced": (13, SECOND),
    "third whole": (14, THIRD),
}


@pytest.mark.parametrize("place", LEFT)
def test_what_was_synced_with_its_name_outlives_a_power_loss(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, expected = LEFT[place]
    left = _after_power_loss(tmp_path, at, monkeypatch)
    assert left is None if expected is None else left is not None
    assert {name: one for name, one in (left or {}).items() if not name.startswith(".")} == (expected or {})


def test_a_line_added_to_an_empty_file_does_not_make_its_name_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path) -> None:
        make_directory(folder)
        write_bytes(folder / "lines", b"")
        append_line(folder / "lines", "first")
        write_bytes(folder / "other", b"")

    assert _after_power_loss(tmp_path, 8, monkeypatch, write) == {"lines": b"first\n"}


@dataclass(frozen=True)
class _Careless:
    """A program that does not write its counter whole."""

    def prepare(self, shared: Path) -> None:
        """Nothing is read."""

    def watched(self, folder: Path) -> Path:
        return folder

    def is_finished(self, folder: Path) -> bool:
        return True

    def start(self, shared: Path, folder: Path, boundary: Callable[[], None]) -> None:
        counter = folder / "counter"
        make_directory(folder)
        number = int(counter.read_bytes()) if counter.exists() else 0
        boundary()
        write_bytes(counter, str(number + 1).encode())

    def result(self, folder: Path) -> Mapping[str, bytes]:
        return {"counter": (folder / "counter").read_bytes()}


def test_a_program_that_counts_twice_is_found(tmp_path: Path) -> None:
    """It goes on from where it was, so a kill after its last write makes it count once more."""
    lines: list[str] = []
    counts = campaign(_Careless(), tmp_path / "work", Plan(), lines.append)
    assert counts.fault_points >= 6
    assert counts.kills >= counts.fault_points
    assert len(counts.mismatches) == len(lines) > 0
    assert all("differs in counter" in line for line in lines)
