"""A grid through the command line: all cells, one results.jsonl, skipped when repeated, other settings refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sfedlora as sfedlora_package
from sfedlora.config.presets import PRESETS
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
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        for when, split in itertools.product(("initial", "last", "best"), ("validation", "test")):
            assert len(summary[when][split].pop("clients")) == 3  # single clients stay in the run directory
        assert line["summary"] == summary
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


def test_all_presets_go_into_one_table_and_one_figure(tmp_path: Path, capsys: Capsys) -> None:
    spelled = {"method": {"name": "fedsa"}, "lora": {"scaling": "sfed", "init": "independent"}}
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 1}, **spelled)
    folder = tmp_path / "grid"
    outcome = sfedlora(capsys, "compare", config, "--output", folder, "--vary", f"preset={','.join(PRESETS)}")
    assert outcome.code == 0, outcome.err
    lines = _lines(folder)
    assert [line["settings"]["preset"] for line in lines] == list(PRESETS)
    for line in lines:
        preset = PRESETS[line["settings"]["preset"]]
        assert line["settings"]["method.name"] == preset["method"]["name"]
        assert line["settings"]["lora.scaling"] == preset["lora"]["scaling"]
        assert line["settings"]["lora.init"] == preset["lora"]["init"]
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")] == ["figures/rounds.png"]
    shown = outcome.out.splitlines()
    assert all(len(line) <= 120 for line in shown if not line.startswith(("results:", "figure:")))
    header = [[text.strip() for text in line.strip("┃").split("┃")] for line in shown if line.startswith("┃")]
    columns = ["preset", "loss last", "perplexity last", "loss best", "perplexity best"]
    assert [" ".join(texts).strip() for texts in zip(*header, strict=True)] == columns
    rows = [[text.strip() for text in line.strip("│").split("│")] for line in shown if line.startswith("│")]
    assert [row[0] for row in rows] == list(PRESETS)
    for row, line in zip(rows, lines, strict=True):
        last, best = (line["summary"][which]["test"]["weighted"] for which in ("last", "best"))
        numbers = [last["eval_loss"], last["perplexity"], best["eval_loss"], best["perplexity"]]
        assert [float(text) for text in row[1:]] == pytest.approx(numbers, rel=1e-4)


def test_what_is_varied_beside_presets_wins_in_either_order(tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 1})
    axes = ["--vary", "lora.scaling=rslora,lora", "--vary", "preset=fedit,ffa-lora"]
    assert _compare(capsys, config, *axes).code == 0
    settings = [line["settings"] for line in _lines(tmp_path / "grid")]
    found = [(s["lora.scaling"], s["method.name"], s["lora.init"]) for s in settings]
    assert found == [(rule, method, "shared") for rule in ("rslora", "lora") for method in ("fedit", "ffa")]


def test_whatever_differs_is_reported(tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 1})
    assert _compare(capsys, config, "--vary", "rounds.proximal_mu=0,5").code == 0
    assert [line["settings"]["rounds.proximal_mu"] for line in _lines(tmp_path / "grid")] == [0.0, 5.0]


def test_lists_of_ranks_are_compared(tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", preset="hetlora", rounds={"num_rounds": 2})
    folder = tmp_path / "grid"
    outcome = sfedlora(capsys, "compare", config, "--output", folder, "--vary", "lora.rank=[2,3,4],4,[4,3,2],2")
    assert outcome.code == 0, outcome.err
    lines = _lines(folder)
    assert [line["settings"]["lora.rank"] for line in lines] == [[2, 3, 4], 4, [4, 3, 2], 2]
    assert list(lines[0]["settings"]["gamma"].values()) == pytest.approx([4, 8 / 3, 2])
    assert lines[1]["settings"]["gamma"] == 2
    assert "[2,3,4]" in outcome.out
    assert {path.name for path in (folder / "figures").iterdir()} == {"rounds.png", "rank.png"}


CONTRADICTIONS = {
    "an override of what a preset brings": (
        ["--methods", "sfed-lora,fedit", "lora.scaling=rslora"],
        "lora.scaling=rslora: preset fedit sets it in its own cells; leave it out, or write --vary lora.scaling=rslora",
    ),
    "the same in a section": (["--vary", "preset=fedit", "lora={rank: 2, init: shared}"], "lora.init=shared: preset"),
    "two names of one run": (
        ["--methods", "sfed-lora,fedsa"],
        "cells method=sfed-lora and method=fedsa are the same run; leave one of them out",
    ),
    "presets twice": (["--methods", "fedit", "--vary", "preset=flora"], "presets are varied twice"),
    "an unknown preset": (
        ["--vary", "preset=fedsa-lora,flroa"],
        "cell preset=flroa: override preset: unknown preset 'flroa'; did you mean 'flora'?",
    ),
    "an empty preset": (["--vary", "preset="], "--vary preset: expected key=value,value,..., got an empty value"),
    "an unknown method": (["--methods", "flora,florra"], "unknown method 'florra'; did you mean 'flora'?"),
    "a rank list of another length": (
        ["--methods", "fedit,flora", "lora.rank=[2,4]"],
        "lora.rank: method 'fedit' needs one rank for all clients, got [2, 4]",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(case: str, tiny_config: Path, tmp_path: Path, capsys: Capsys) -> None:
    arguments, message = CONTRADICTIONS[case]
    outcome = _compare(capsys, tiny_config, *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "grid").exists()


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
    assert "rank" in done.stdout
    assert "pip install 'sfedlora[report]'" in done.stderr
