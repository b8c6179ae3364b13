"""Killed, interrupted and resumed runs end with the bits of an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sfedlora import RunConfig, RunResult, run
from sfedlora.cli.progress import drive
from sfedlora.compare import compare_events
from sfedlora.config.grid import Axis, make_cells
from sfedlora.errors import Interrupted
from sfedlora.experiment import RunEvent, resume_events, run_events
from sfedlora.federation import round as round_module
from sfedlora.federation.round import ClientTrained, RoundFinished
from support.command_line import sfedlora, write_config
from support.processes import ForkServer, wait_until

Capsys = pytest.CaptureFixture[str]


def _config(folder: Path, **sections: object) -> Path:
    """Three clients of two, three rounds, kept optimizer moments and dropout: all that a resume must bring back."""
    return write_config(
        folder / "run.yaml",
        data={"max_length": 32},
        rounds={"num_rounds": 3, "cohort_size": 2},
        lora={"rank": 4, "dropout": 0.1},
        local={"local_steps": 6, "optimizer_state": "keep", "schedule": "cosine"},
        output=str(folder / "run"),
        **sections,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The run without interruption."""
    return run(RunConfig.load(_config(tmp_path_factory.mktemp("whole"))))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    helper = ForkServer()
    yield helper
    helper.close()


def _untimed(metrics: list[dict[str, Any]] | tuple[Any, ...]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in metrics]


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def assert_same_run(run_dir: Path, whole: RunResult) -> None:
    """Adapters and checkpoints byte for byte, metrics but for times, summary."""
    for kind in ("adapters", "checkpoints"):
        files = {path.relative_to(whole.run_dir) for path in (whole.run_dir / kind).rglob("*") if path.is_file()}
        assert {path.relative_to(run_dir) for path in (run_dir / kind).rglob("*") if path.is_file()} == files
        for name in files:
            assert (run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes(), name
    assert _untimed(_metrics(run_dir)) == _untimed(whole.metrics)
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8")) == whole.summary
    assert not [path for path in run_dir.rglob("*") if path.name.startswith(".")]


def _lines(number: int) -> Callable[[Path], bool]:
    def happened(run_dir: Path) -> bool:
        path = run_dir / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= number

    return happened


MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "before the first checkpoint": (lambda here: (here / "config.yaml").exists(), 0.0),
    "in round 1": (lambda here: (here / "checkpoints" / "round-000000").exists(), 0.03),
    "line written, checkpoint not": (_lines(1), 0.0),
    "early in round 2": (lambda here: (here / "checkpoints" / "round-000001").exists(), 0.02),
    "late in round 2": (lambda here: (here / "checkpoints" / "round-000001").exists(), 0.12),
    "clients written, checkpoint not": (lambda here: (here / "checkpoints" / "personal" / "000002").exists(), 0.0),
    "while a checkpoint is written": (lambda here: (here / "checkpoints" / ".round-000002.tmp").exists(), 0.0),
    "while adapters are written": (lambda here: (here / "adapters" / "shared").exists(), 0.0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bits(
    moment: str, whole: RunResult, server: ForkServer, tmp_path: Path, capsys: Capsys
) -> None:
    happened, delay = MOMENTS[moment]
    run_dir = tmp_path / "run"
    for _ in range(5):  # on a busy machine the run may end before the signal is sent
        child = server.start(tmp_path, "run", _config(tmp_path))
        wait_until(lambda: happened(run_dir))
        time.sleep(delay)
        child.send(signal.SIGKILL)
        if child.wait() == -signal.SIGKILL:
            break
        shutil.rmtree(run_dir)
    else:
        pytest.fail("the run always ended before it could be killed")
    assert not (run_dir / "summary.json").exists()
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    assert_same_run(run_dir, whole)


def test_killed_again_and_again(whole: RunResult, server: ForkServer, tmp_path: Path, capsys: Capsys) -> None:
    run_dir = tmp_path / "run"
    child = server.start(tmp_path, "run", _config(tmp_path))
    for number in (1, 2):
        wait_until(lambda number=number: _lines(number)(run_dir))  # type: ignore[misc]
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child = server.start(tmp_path, "resume", run_dir)
    assert child.wait() == 0, child.err
    assert_same_run(run_dir, whole)
    assert sfedlora(capsys, "resume", run_dir).code == 0


def test_ctrl_c_in_a_round_resumes_to_the_same_bits(
    whole: RunResult, server: ForkServer, tmp_path: Path, capsys: Capsys
) -> None:
    run_dir = tmp_path / "run"
    child = server.start(tmp_path, "run", _config(tmp_path))
    wait_until((run_dir / "checkpoints" / "round-000001").exists)
    time.sleep(0.03)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert "Traceback" not in child.err
    assert f"sfedlora resume {run_dir}" in child.err
    assert not (run_dir / "summary.json").exists()
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    assert_same_run(run_dir, whole)


def test_a_second_ctrl_c_stops_at_once(whole: RunResult, server: ForkServer, tmp_path: Path, capsys: Capsys) -> None:
    run_dir = tmp_path / "run"
    config = _config(tmp_path)
    child = server.start(tmp_path, "run", config, "local.local_steps=4000")
    wait_until((run_dir / "checkpoints" / "round-000000").exists)
    time.sleep(0.1)
    child.send(signal.SIGINT)
    wait_until(lambda: "again to stop at once" in child.err)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert "stopped at once" in child.err
    assert "Traceback" not in child.err
    shutil.rmtree(run_dir)
    assert sfedlora(capsys, "run", config).code == 0
    assert_same_run(run_dir, whole)


def _stop_after(events: Iterator[Any], number: int) -> None:
    """Throw `Interrupted` after so many trained clients, as the command line does."""
    seen = 0
    for event in events:
        seen += isinstance(event, ClientTrained)
        if seen == number:
            with pytest.raises(Interrupted):
                cast("Any", events).throw(Interrupted("stop"))
            return


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_stopped_after_any_client(number: int, whole: RunResult, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _stop_after(run_events(RunConfig.load(_config(tmp_path))), number)
    list(resume_events(run_dir))
    assert_same_run(run_dir, whole)


def test_what_a_stopped_client_did_is_used_not_done_again(tmp_path: Path) -> None:
    # One after the other; a stack of which one client is missing is trained again whole, for the same bits.
    run_dir = tmp_path / "run"
    _stop_after(run_events(RunConfig.load(_config(tmp_path), ["runner=serial"])), 1)
    facts_path = next((run_dir / "checkpoints" / "partial").glob("*.json"))
    facts = json.loads(facts_path.read_text(encoding="utf-8"))
    facts["metrics"]["train_loss"] = 1234.5
    facts_path.write_text(json.dumps(facts), encoding="utf-8")
    sums_path = facts_path.with_name("checksums.sha256")
    new = f"{hashlib.sha256(facts_path.read_bytes()).hexdigest()}  {facts_path.name}"
    lines = [new if line.endswith(".json") else line for line in sums_path.read_text(encoding="utf-8").splitlines()]
    sums_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    list(resume_events(run_dir))
    assert _metrics(run_dir)[0]["clients"][facts["client_id"]]["train_loss"] == 1234.5
    assert not (run_dir / "checkpoints" / "partial").exists()


VARIANTS = {
    "flora": ["preset=flora", "local.optimizer_state=reset"],
    "fedex": ["preset=fedex-lora"],
    "flora with ranks of their own": ["preset=flora", "lora.rank=[2,5,3]", "local.optimizer_state=reset"],
    "fedsa with ranks of their own": ["lora.rank=[2,5,3]"],
    "hetlora with drawn ranks": ["preset=hetlora", "lora.rank=[2,5,3,4]", "lora.rank_assignment=drawn"],
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], RunResult]:
    """Settings with base deltas or ranks of their own, and their run without interruption."""
    overrides = VARIANTS[request.param]
    return overrides, run(RunConfig.load(_config(tmp_path_factory.mktemp("variant")), overrides))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_base_deltas_and_ranks_survive_a_stop(
    number: int, variant: tuple[list[str], RunResult], tmp_path: Path, capsys: Capsys
) -> None:
    overrides, uninterrupted = variant
    _stop_after(run_events(RunConfig.load(_config(tmp_path), overrides)), number)
    outcome = sfedlora(capsys, "resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_base_deltas_and_ranks_survive_a_kill(
    variant: tuple[list[str], RunResult], server: ForkServer, tmp_path: Path, capsys: Capsys
) -> None:
    overrides, uninterrupted = variant
    run_dir = tmp_path / "run"
    child = server.start(tmp_path, "run", _config(tmp_path), *overrides)
    wait_until((run_dir / "checkpoints" / "round-000001").exists)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    outcome = sfedlora(capsys, "resume", run_dir)
    assert outcome.code == 0, outcome.err
    assert_same_run(run_dir, uninterrupted)


def test_a_second_stop_in_the_same_round_loses_no_client(whole: RunResult, tmp_path: Path) -> None:
    config = _config(tmp_path, partition={"num_clients": 4})
    run_dir = tmp_path / "run"
    _stop_after(run_events(RunConfig.load(config, ["rounds.cohort_size=4"])), 3)
    kept = {path.name for path in (run_dir / "checkpoints" / "partial").iterdir()}
    _stop_after(resume_events(run_dir), 1)
    assert {path.name for path in (run_dir / "checkpoints" / "partial").iterdir()} == kept


def test_the_first_ctrl_c_waits_for_the_client_in_hand(tmp_path: Path, capsys: Capsys) -> None:
    seen: list[str] = []

    def pressing() -> Iterator[RunEvent]:
        inner = run_events(RunConfig.load(_config(tmp_path)))
        for event in inner:
            seen.append(type(event).__name__)
            if isinstance(event, RoundFinished):
                signal.raise_signal(signal.SIGINT)
            try:
                yield event
            except Interrupted as stop:
                with pytest.raises(Interrupted):
                    cast("Any", inner).throw(stop)
                raise

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="sfedlora resume"):
        drive(pressing())
    assert signal.getsignal(signal.SIGINT) is before
    assert seen[-1] == "RoundFinished"
    assert "stopping after the client in hand" in capsys.readouterr().err


def test_a_comparison_that_is_stopped_keeps_its_cell(whole: RunResult, tmp_path: Path) -> None:
    cells = make_cells(_config(tmp_path), [], [Axis.of_key("seed", ["0", "1"])], tmp_path / "grid")
    _stop_after(compare_events(cells, tmp_path / "grid"), 3)
    run_dir = Path(cells[0].config.output)
    assert (run_dir / "checkpoints" / "partial").is_dir()
    for _ in compare_events(cells, tmp_path / "grid"):
        pass
    assert_same_run(run_dir, whole)


def test_a_run_moved_after_a_stop_goes_on(whole: RunResult, tmp_path: Path, capsys: Capsys) -> None:
    _stop_after(run_events(RunConfig.load(_config(tmp_path))), 3)
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    assert sfedlora(capsys, "resume", moved).code == 0
    assert_same_run(moved, whole)
    assert not (tmp_path / "run").exists()


def test_resume_refuses_changed_data(tmp_path: Path, capsys: Capsys) -> None:
    source = Path(__file__).parents[2] / "src" / "sfedlora" / "assets" / "tiny_chat.jsonl"
    for name in ("main", "extra"):
        shutil.copy(source, tmp_path / f"{name}.jsonl")
    config = _config(tmp_path)
    data = [f"data.source={tmp_path / 'main.jsonl'}", f"data.validation={tmp_path / 'extra.jsonl'}"]
    _stop_after(run_events(RunConfig.load(config, data)), 2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes() if (tmp_path / "run" / "metrics.jsonl").exists() else b""
    for name, key in (("main", "data.source"), ("extra", "data.validation")):
        path = tmp_path / f"{name}.jsonl"
        content = path.read_text(encoding="utf-8")
        path.write_text(content.replace("What is AI?", "What is it?"), encoding="utf-8")
        outcome = sfedlora(capsys, "resume", tmp_path / "run")
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: {key}: ")
        assert "has changed since the run began" in outcome.err
        path.write_text(content, encoding="utf-8")
    assert not before
    assert sfedlora(capsys, "resume", tmp_path / "run").code == 0


def test_resume_refuses_an_edited_partition_and_other_weights(tmp_path: Path, capsys: Capsys) -> None:
    assets = Path(__file__).parents[2] / "src" / "sfedlora" / "assets"
    model = shutil.copytree(assets / "tiny_llama", tmp_path / "model")
    _stop_after(run_events(RunConfig.load(_config(tmp_path), [f"model.source={model}"])), 3)
    config = tmp_path / "run" / "config.yaml"
    written = config.read_text(encoding="utf-8")
    config.write_text(written.replace("seed: 0", "seed: 5"), encoding="utf-8")
    outcome = sfedlora(capsys, "resume", tmp_path / "run")
    assert outcome.code == 2
    assert "was edited since the run began" in outcome.err
    config.write_text(written, encoding="utf-8")
    partition = tmp_path / "run" / "partition.json"
    dealt = json.loads(partition.read_text(encoding="utf-8"))
    first = next(iter(dealt["clients"].values()))
    first["train"], first["test"] = first["test"], first["train"]
    whole = partition.read_text(encoding="utf-8")
    partition.write_text(json.dumps(dealt), encoding="utf-8")
    outcome = sfedlora(capsys, "resume", tmp_path / "run")
    assert outcome.code == 2
    assert "dealt otherwise" in outcome.err
    partition.write_text(whole, encoding="utf-8")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    outcome = sfedlora(capsys, "resume", tmp_path / "run")
    assert outcome.code == 2
    assert "other weights" in outcome.err


def test_leftovers_of_a_killed_process_are_removed(whole: RunResult, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _stop_after(run_events(RunConfig.load(_config(tmp_path))), 3)
    for folder in ("checkpoints/.partial.tmp", "checkpoints/.round-000002.tmp/clients", "adapters/shared/.adapter-ab"):
        (run_dir / folder).mkdir(parents=True)
    (run_dir / ".metrics.jsonl.tmp").write_text("{", encoding="utf-8")
    list(resume_events(run_dir))
    assert_same_run(run_dir, whole)


def test_a_torn_last_metrics_line_is_repaired(whole: RunResult, tmp_path: Path) -> None:
    _stop_after(run_events(RunConfig.load(_config(tmp_path))), 3)
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"schema_version": 1, "round_')
    list(resume_events(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [None, 2, 4])
def test_a_cohort_too_large_for_memory(
    number: int | None, whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outcomes that wait on the disk: the same bits, stopped after some client or not, and nothing is left behind."""
    monkeypatch.setattr(round_module, "SPOOLED_ABOVE", 0)
    run_dir = tmp_path / "run"
    config = RunConfig.load(_config(tmp_path))
    if number is None:
        run(config)
    else:
        _stop_after(run_events(config), number)
        assert (run_dir / "checkpoints" / "partial").exists()
        (run_dir / "checkpoints" / ".spool-of-a-killed-run.tmp").mkdir()
        list(resume_events(run_dir))
    assert_same_run(run_dir, whole)
