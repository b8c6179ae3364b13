"""A grid through the command line: all cells, one results.jsonl, skipped when repeated, other settings refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sfedlora as sfedlora_package
from support.command_line import Outcome, sfedlora, write_config

Capsys = pytest.CaptureFixture[str]


def _lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def _compare(capsys: Capsys, config: Path, *arguments: str) -> Outcome:
    return sfedlora(capsys, "compare", config, "--output", config.parent / "grid", "--no-figures", *arguments)


def test_a_grid_runs_once(tiny_config: Path, tmp_path: Path, capsys: Capsys) -> None:
    outcome = _compare(capsys, tiny_config, "--ranks", "2,4", "--vary", "local.optimizer=adamw,sgd", "seed=3")
    assert outcome.code == 0, outcome.err
    lines = _lines(tmp_path / "grid")
    expected = [(rank, optimizer) for rank in (2, 4) for optimizer in ("adamw", "sgd")]
    assert [(line["settings"]["lora.rank"], line["settings"]["local.optimizer"]) for line in lines] == expected
    assert [line["cell"] for line in lines] == [f"rank={rank},optimizer={name}" for rank, name in expected]
    for line in lines:
        assert set(line) == {"cell", "settings", "run_dir", "summary"}
        assert line["settings"]["seed"] == 3
        run_dir = Path(line["run_dir"])
        assert line["summary"] == json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        assert line["settings"]["gamma"] == environment["scaling"]["gamma"]
    before = (tmp_path / "grid" / "results.jsonl").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/*.json*")}

    again = _compare(capsys, tiny_config, "--ranks", "2,4", "--vary", "local.optimizer=adamw,sgd", "seed=3")
    assert again.code == 0
    assert again.err.count("skipped") == 4
    assert (tmp_path / "grid" / "results.jsonl").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times

    wider = _compare(capsys, tiny_config, "--ranks", "2,4,8", "--vary", "local.optimizer=sgd,adamw", "seed=3")
    assert wider.err.count("skipped") == 4
    assert len(_lines(tmp_path / "grid")) == 6


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (["local.learning_rate=1e-2"], ["local.learning_rate=2e-2"], "local.learning_rate"),
        (["local.max_grad_norm=1"], [], "local.max_grad_norm"),
        ([], ["local.max_grad_norm=1"], "local.max_grad_norm"),
        (["data.columns={prompt: null}"], [], "data.columns"),
    ],
)
def test_other_settings_are_refused(  # noqa: PLR0917 - pytest passes them by name
    first: list[str], second: list[str], key: str, tiny_config: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert _compare(capsys, tiny_config, "--ranks", "2", *first).code == 0
    before = _lines(tmp_path / "grid")
    outcome = _compare(capsys, tiny_config, "--ranks", "2,4", *second)
    assert outcome.code == 2
    assert f"holds a run with {key}" in outcome.err
    assert _lines(tmp_path / "grid") == before
    assert len(list((tmp_path / "grid").glob("rank*"))) == 1, "nothing ran before the refusal"


def test_presets_win_over_what_the_file_spells_out(tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        method={"name": "fedsa"},
        lora={"scaling": "sfed", "init": "independent"},
        rounds={"num_rounds": 1},
    )
    outcome = _compare(capsys, config, "--methods", "sfed-lora,fedsa-rslora,ffa-lora,local")
    assert outcome.code == 0, outcome.err
    settings = [line["settings"] for line in _lines(tmp_path / "grid")]
    assert [(s["method.name"], s["lora.scaling"], s["lora.init"]) for s in settings] == [
        ("fedsa", "sfed", "independent"),
        ("fedsa", "rslora", "shared"),
        ("ffa", "lora", "shared"),
        ("local", "sfed", "independent"),
    ]


def test_keys_of_one_name_are_told_apart(tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 1}, lora={"init": "independent"})
    outcome = _compare(capsys, config, "--clients", "2,3", "--vary", "lora.num_clients=effective,total")
    assert outcome.code == 0, outcome.err
    cells = [line["cell"] for line in _lines(tmp_path / "grid")]
    assert cells[0] == "partition.num_clients=2,lora.num_clients=effective"
    assert len(set(cells)) == 4


def test_a_list_is_one_value(tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 1})
    outcome = _compare(capsys, config, "--vary", "lora.target_modules=[q_proj,v_proj],all-linear")
    assert outcome.code == 0, outcome.err
    assert [line["cell"] for line in _lines(tmp_path / "grid")] == [
        "target_modules=[q_proj,v_proj]",
        "target_modules=all-linear",
    ]


def test_a_folder_with_other_files_is_refused_before_anything_runs(
    tiny_config: Path, tmp_path: Path, capsys: Capsys
) -> None:
    taken = tmp_path / "grid" / "probe"
    assert _compare(capsys, tiny_config, "--ranks", "2", "rounds.num_rounds=1").code == 0
    folder = Path(_lines(tmp_path / "grid")[0]["run_dir"])
    (folder / "config.yaml").rename(folder / "config.old")
    outcome = _compare(capsys, tiny_config, "--ranks", "4,2", "rounds.num_rounds=1")
    assert outcome.code == 2
    assert "already holds other files" in outcome.err
    assert not taken.exists()
    assert (folder / "config.old").exists()
    assert len(list((tmp_path / "grid").glob("rank*"))) == 1


def test_a_finished_cell_whose_data_changed_is_not_skipped(tiny_config: Path, tmp_path: Path, capsys: Capsys) -> None:
    packaged = Path(sfedlora_package.__file__).parent / "assets" / "tiny_chat.jsonl"
    rows, extra = tmp_path / "rows.jsonl", tmp_path / "extra.jsonl"
    for path in (rows, extra):
        path.write_bytes(packaged.read_bytes())
    arguments = ["--ranks", "2", f"data.source={rows}", f"data.test={extra}"]
    assert _compare(capsys, tiny_config, *arguments).code == 0
    assert _compare(capsys, tiny_config, *arguments).err.count("skipped") == 1
    for key, path in (("source", rows), ("test", extra)):
        content = path.read_bytes()
        path.write_bytes(content + content.splitlines(keepends=True)[0])
        outcome = _compare(capsys, tiny_config, *arguments)
        assert outcome.code == 2
        assert f"data.{key}: {path} has changed" in outcome.err
        path.write_bytes(content)


@pytest.mark.parametrize("verb", ["compare", "demo"])
def test_an_output_that_is_a_run_is_refused_before_anything_is_written(
    verb: str, tiny_config: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert sfedlora(capsys, "run", tiny_config, "rounds.num_rounds=1").code == 0
    before = sorted((tmp_path / "run").rglob("*"))
    arguments = [tiny_config, "--ranks", "2"] if verb == "compare" else ["--quick"]
    outcome = sfedlora(capsys, verb, *arguments, "--output", tmp_path / "run")
    assert outcome.code == 2
    assert "is a run of its own" in outcome.err
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_without_matplotlib_the_table_stays(tiny_config: Path, tmp_path: Path) -> None:
    """In a process of its own, in which matplotlib is marked as not to be found."""
    hidden = "import sys; sys.modules['matplotlib'] = None; from sfedlora.cli import main; main()"
    arguments = ["compare", str(tiny_config), "--ranks", "2", "--output", str(tmp_path / "grid")]
    done = subprocess.run([sys.executable, "-c", hidden, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "results: " in done.stdout
    assert "rank=2" in done.stdout
    assert "pip install 'sfedlora[report]'" in done.stderr
