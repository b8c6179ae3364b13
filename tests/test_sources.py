"""Source strings: paths, files of installed packages, hub ids."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import sfedlora
from sfedlora.errors import InputError
from sfedlora.sources import cache_root, local_path

PACKAGE = Path(sfedlora.__file__).parent


def test_a_path_that_exists_and_one_that_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("owner/name") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    assert local_path("~/rows.jsonl") == tmp_path / "rows.jsonl"


def test_a_file_of_a_package() -> None:
    assert local_path("package:sfedlora/assets/tiny_llama") == PACKAGE / "assets" / "tiny_llama"
    assert local_path("package:sfedlora") == PACKAGE


def test_a_package_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "explosive_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('was imported')", encoding="utf-8")
    (folder / "rows.jsonl").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert local_path("package:explosive_package/rows.jsonl") == folder / "rows.jsonl"
    assert "explosive_package" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:", "expected package:NAME/path"),
        ("package:/etc/passwd", "expected package:NAME/path"),
        ("package:a-b/x", "expected package:NAME/path"),
        ("package:os.path/x", "expected package:NAME/path"),
        ("package:nothing_of_this_name/x", "is not installed here"),
        ("package:json/../os.py", "must stay inside"),
        ("package:sfedlora//etc/passwd", "must stay inside"),
        ("package:math/x", "is not installed here"),
        ("package:sfedlora/assets/none.jsonl", "holds: .*tiny_chat.jsonl"),
        ("package:sfedlora/none/none", "holds: .*assets"),
    ],
)
def test_a_package_source_that_cannot_be_used(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        local_path(source)


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFEDLORA_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("SFEDLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "sfedlora"
