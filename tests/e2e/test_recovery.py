"""Damaged, forged, newer, shared and earlier run directories: the run goes on to the same bits, or says why not."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from sfedlora import RunConfig, RunResult, run
from sfedlora.errors import Interrupted
from sfedlora.experiment import RunPrepared, resume_events, run_events
from sfedlora.federation.round import ClientTrained
from support.command_line import command, sfedlora, write_config

Capsys = pytest.CaptureFixture[str]
FORMAT_1 = Path(__file__).parents[1] / "artifacts" / "format_1" / "run"


def _config(folder: Path, **sections: object) -> Path:
    return write_config(
        folder / "run.yaml",
        data={"max_length": 24},
        rounds={"num_rounds": 3, "cohort_size": 2},
        lora={"rank": 2, "target_modules": ["v_proj"]},
        local={"optimizer_state": "keep"},
        runner="serial",
        output=str(folder / "run"),
        **sections,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(RunConfig.load(_config(tmp_path_factory.mktemp("whole"))))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in round 3 after one of its two clients: rounds 1 and 2 are kept, and round 0 or the best."""
    folder = tmp_path_factory.mktemp("stopped")
    _stop_after(RunConfig.load(_config(folder)), 5)
    return folder / "run"


@pytest.fixture
def run_dir(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def _stop_after(config: RunConfig, number: int) -> None:
    events = run_events(config)
    seen = 0
    for event in events:
        seen += isinstance(event, ClientTrained)
        if seen == number:
            with pytest.raises(Interrupted):
                cast("Any", events).throw(Interrupted("stop"))
            return


def _content(run_dir: Path) -> dict[str, object]:
    files = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    lines = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    untimed = [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in lines]
    del files["config.yaml"], files["environment.json"]  # both name the folder
    return {**files, "metrics": untimed}


def _without_initial_clients(run_dir: Path) -> dict[str, object]:
    """The content without what the first format did not write: the initial metrics of single clients, checksums."""
    content = {name: one for name, one in _content(run_dir).items() if not name.endswith("checksums.sha256")}
    for name in content:
        if name == "summary.json" or name.endswith("state.json"):
            facts = json.loads((run_dir / name).read_text(encoding="utf-8"))
            for split in facts.get("progress", facts)["initial"].values():
                split.pop("clients", None)
            content[name] = facts
    return content


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


PARTS = [
    "round-000002/state.json",
    "round-000002/server.safetensors",
    "round-000002/clients.json",
    "round-000002/checksums.sha256",
    "personal/000002/*",
    "optimizer/000002/*",
]


@pytest.mark.parametrize("damage", [_flip, Path.unlink])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    part: str, damage: Callable[[Path], None], run_dir: Path, whole: RunResult, capsys: Capsys
) -> None:
    path = min((run_dir / "checkpoints").glob(part))
    damage(path)
    named = path if path.name != "checksums.sha256" else path.parent  # a false checksum is another file's
    outcome = sfedlora(capsys, "evaluate", run_dir)
    assert outcome.code == 0, outcome.err
    assert f"warning: the checkpoint of round 2 is damaged ({named}" in outcome.err
    assert json.loads(outcome.out)["round_num"] == 1
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    assert f"warning: the checkpoint of round 2 is damaged ({named}" in outcome.err
    assert "the state after round 1 is used instead" in outcome.err
    assert "round 2/3" in outcome.err
    assert _content(run_dir) == _content(whole.run_dir)


def test_where_all_are_damaged_nothing_is_touched(run_dir: Path, capsys: Capsys) -> None:
    for path in (run_dir / "checkpoints").glob("round-*/server.safetensors"):
        _flip(path)
    before = _content(run_dir)
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 3
    assert "run failed: " in outcome.err
    assert "round-000002/server.safetensors: damaged" in outcome.err
    assert "no kept round before it is intact" in outcome.err
    assert _content(run_dir) == before


@pytest.mark.parametrize("name", ["*.json", "*.safetensors", "checksums.sha256"])
def test_a_damaged_outcome_of_an_interrupted_round_is_trained_again(
    name: str, run_dir: Path, whole: RunResult, capsys: Capsys
) -> None:
    _flip(min((run_dir / "checkpoints" / "partial").glob(name)))
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    assert "warning: the clients of the interrupted round train again" in outcome.err
    assert _content(run_dir) == _content(whole.run_dir)


def test_a_lost_best_round_is_replaced_by_the_best_that_is_kept(tmp_path: Path, capsys: Capsys) -> None:
    config = RunConfig.load(_config(tmp_path), ["local.learning_rate=1.0", "rounds.num_rounds=5"])  # it gets worse
    _stop_after(config, 9)
    run_dir = tmp_path / "run"
    losses = [
        json.loads(line)["eval_loss"] for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert losses[1] == min(losses), "or this run shows nothing"
    _flip(run_dir / "checkpoints" / "round-000002" / "server.safetensors")
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    assert "the checkpoint of round 2 is damaged" in outcome.err
    assert "is used instead" not in outcome.err
    best = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["best"]["round_num"]
    assert best in (3, 4, 5)


def test_a_run_of_the_first_format_goes_on(tmp_path: Path, capsys: Capsys) -> None:
    """Written by an earlier version, stopped in round 3: it ends as this version's own run does."""
    run_dir = shutil.copytree(FORMAT_1, tmp_path / "run")
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    own = run(RunConfig.load(run_dir / "config.yaml", [f"output={tmp_path / 'own'}"]))
    assert _content(run_dir).keys() | {"checkpoints/round-000002/checksums.sha256"} == _content(own.run_dir).keys()
    ours, theirs = _without_initial_clients(run_dir), _without_initial_clients(own.run_dir)
    for name in ours.keys() - {"checkpoints/round-000002/state.json"}:
        assert ours[name] == theirs[name], name
    assert stat.S_IMODE((run_dir / "checkpoints" / "personal").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["environment.json", "checkpoints/round-000002/state.json"])
def test_a_newer_format_is_refused_with_what_to_do(name: str, run_dir: Path, capsys: Capsys) -> None:
    path = run_dir / name
    content = path.read_text(encoding="utf-8")
    assert '"format_version": 2' in content
    path.write_text(content.replace('"format_version": 2', '"format_version": 3'), encoding="utf-8")
    for verb in ("resume", "evaluate"):
        outcome = sfedlora(capsys, verb, run_dir)
        assert outcome.code == 2
        assert "in format 3 by a newer sfedlora" in outcome.err
        assert "install a newer sfedlora" in outcome.err


def test_lines_that_lack_are_told(run_dir: Path, capsys: Capsys) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 3
    assert "has the rounds [2], expected 1 to 2" in outcome.err


@pytest.mark.parametrize("name", ["adapters", "metrics.jsonl", "checkpoints/personal", "checkpoints/.round-000003.tmp"])
def test_a_link_inside_a_run_directory_is_refused(name: str, run_dir: Path, tmp_path: Path, capsys: Capsys) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine", encoding="utf-8")
    path = run_dir / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    for verb in ("resume", "evaluate", "verify"):
        outcome = sfedlora(capsys, verb, run_dir)
        assert outcome.code == 2, outcome.err
        assert f"{path}: is a link" in outcome.err
    assert [item.name for item in precious.iterdir()] == ["file"]


def test_a_second_process_gets_one_clear_message(run_dir: Path, capsys: Capsys) -> None:
    events = resume_events(run_dir)
    next(iter(events))
    other = subprocess.run(command("resume", run_dir), capture_output=True, text=True, check=False)
    assert other.returncode == 2
    [message] = other.stderr.splitlines()
    assert message.startswith(f"error: {run_dir}: in use by process {os.getpid()} on ")
    cast("Any", events).close()
    assert not (run_dir / ".owner").exists()


def test_what_a_run_leaves_that_was_killed_before_it_began_is_in_nobodys_way(tmp_path: Path, capsys: Capsys) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in (".owner", "environment.json", ".partition.json.tmp"):
        (run_dir / name).write_text("{", encoding="utf-8")
    assert sfedlora(capsys, "run", _config(tmp_path), "rounds.num_rounds=1").code == 0
    assert not (run_dir / ".owner").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "environment.json").write_text("{}", encoding="utf-8")
    outcome = sfedlora(capsys, "run", _config(tmp_path), f"output={tmp_path / 'other'}")
    assert outcome.code == 2, "without our mark it is somebody's file"
    assert "already holds other files" in outcome.err


@pytest.mark.parametrize("mask", [0, 0o022])
def test_personal_state_is_private_whatever_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        _stop_after(RunConfig.load(_config(tmp_path)), 5)
        partial = _modes(tmp_path / "run" / "checkpoints" / "partial")
        list(resume_events(tmp_path / "run"))
    finally:
        os.umask(before)
    assert len(partial) > 1
    modes = partial | _modes(tmp_path / "run" / "adapters" / "clients")
    for kind in ("personal", "optimizer"):
        modes |= _modes(tmp_path / "run" / "checkpoints" / kind)
    assert all(mode == (0o600 if path.suffix else 0o700) for path, mode in modes.items()), modes
    assert stat.S_IMODE((tmp_path / "run" / "summary.json").stat().st_mode) == 0o666 & ~mask


def _modes(folder: Path) -> dict[Path, int]:
    return {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_source_that_disappears_is_told_on_resume_and_not_missed_in_a_run(
    what: str, tmp_path: Path, whole: RunResult, capsys: Capsys
) -> None:
    assets = Path(__file__).parents[2] / "src" / "sfedlora" / "assets"
    paths = {"data": tmp_path / "rows.jsonl", "model": tmp_path / "model"}
    shutil.copy(assets / "tiny_chat.jsonl", paths["data"])
    shutil.copytree(assets / "tiny_llama", paths["model"])
    overrides = [f"data.source={paths['data']}", f"model.source={paths['model']}"]
    events = run_events(RunConfig.load(_config(tmp_path), overrides))
    seen = 0
    for event in events:
        if isinstance(event, RunPrepared):  # what is trained on is in memory now
            paths[what].rename(tmp_path / "gone")
        seen += isinstance(event, ClientTrained)
        if seen == 5:
            with pytest.raises(Interrupted):
                cast("Any", events).throw(Interrupted("stop"))
            break
    outcome = sfedlora(capsys, "resume", tmp_path / "run")
    assert outcome.code == 2
    assert str(paths[what]) in outcome.err
    assert outcome.err.count("error: ") == 1
    (tmp_path / "gone").rename(paths[what])
    assert sfedlora(capsys, "resume", tmp_path / "run").code == 0
    mine, theirs = _content(tmp_path / "run"), _content(whole.run_dir)
    assert mine["metrics"] == theirs["metrics"]
