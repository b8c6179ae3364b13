"""A folder has one owner, and a killed one does not stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfedlora.errors import InputError, StorageError
from sfedlora.storage import OWNER_FILE, owned

HOLD = """
import pathlib, sys
from sfedlora.storage import owned
with owned(pathlib.Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with other_owner(tmp_path) as process:
        with (
            pytest.raises(InputError, match=rf"in use by process {process.pid} on .* since .*; wait until it has"),
            owned(tmp_path),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / OWNER_FILE).exists(), "a killed process removes nothing"
        with owned(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), owned(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_name_goes_with_the_owner_whatever_ends_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), owned(tmp_path):
        raise KeyboardInterrupt
    with owned(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious", encoding="utf-8")
    (tmp_path / OWNER_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot be written"), owned(tmp_path):
        pass
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == "precious"
