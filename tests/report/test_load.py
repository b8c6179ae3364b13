"""Run directories and results.jsonl as files on disk: what is read, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfedlora.errors import DataError, InputError, StorageError
from sfedlora.report import load_cells, load_run
from sfedlora.report.load import run_points
from support.run_files import write_run


def test_a_run_is_read_with_keys_that_are_not_known(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=3.5))
    assert run.settings["lora.rank"] == 8
    assert run.rounds[0]["something_new"] == {"a": 1}
    assert run_points(run, "eval_loss") == [(0, 3.5), (1, 3.0), (2, 2.5)]
    assert run_points(run, "grad_norm_b") == [(1, 1.0), (2, 0.5)]
    assert run_points(run, "accuracy") == []


def test_a_running_run_has_no_summary_and_a_torn_last_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=None)
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round_num": 3, "eval')
    assert [record["round_num"] for record in load_run(path).rounds] == [1, 2]
    assert load_run(path).summary == {}


def test_values_that_are_no_finite_number_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", losses=[3.0, None], norms=[1.0, float("nan")], initial=None)
    assert run_points(load_run(path), "eval_loss") == [(1, 3.0)]
    assert run_points(load_run(path), "grad_norm_b") == [(1, 1.0)]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("config.yaml", None, InputError, r"no run directory \(config.yaml is missing\)"),
        ("metrics.jsonl", None, InputError, "no round has finished yet"),
        ("metrics.jsonl", "", InputError, "no round has finished yet"),
        ("metrics.jsonl", '{"round_num": 1}\n{broken\n', StorageError, "metrics.jsonl, line 2: not valid JSON"),
        ("metrics.jsonl", "[1]\n", StorageError, "expected a JSON object, found list"),
        ("metrics.jsonl", '{"eval_loss": 1.0}\n', StorageError, "line 1: damaged or edited: round_num is missing"),
        ("summary.json", "{", StorageError, "summary.json: not valid JSON"),
    ],
)
def test_a_broken_run_directory_gives_one_message(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], message: str
) -> None:
    path = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=3.5)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        load_run(path)


def test_bytes_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl, line 1: .*utf-8"):
        load_run(path)


def test_cells_are_found_beside_results_that_were_moved(tmp_path: Path) -> None:
    write_run(tmp_path / "cell-1", losses=[3.0], norms=[1.0], initial=3.5)
    line = {"cell": "c", "settings": {"lora.rank": 8}, "run_dir": "elsewhere/cell-1", "summary": {}, "more": 1}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (cell,) = load_cells(tmp_path / "results.jsonl")
    assert cell.run_dir == tmp_path / "cell-1"
    assert cell.settings == {"lora.rank": 8}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", DataError, "empty; no cell has finished yet"),
        ('{"cell": "a", "settings": {}, "run_dir": "x"}\n', StorageError, "line 1: .* summary is missing"),
        ('{"cell": "a", "settings": 3, "run_dir": "x", "summary": {}}\n', StorageError, "line 1: .* settings is int"),
    ],
)
def test_broken_results_give_one_message(tmp_path: Path, content: str, error: type[Exception], message: str) -> None:
    (tmp_path / "results.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        load_cells(tmp_path / "results.jsonl")


def test_missing_results_are_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_cells(tmp_path / "results.jsonl")
