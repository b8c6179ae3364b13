"""Many clients from the command line, and clients' files that are not the ones a checkpoint refers to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sfedlora import RunConfig
from sfedlora.errors import Interrupted
from sfedlora.experiment import RunEvent, run_events
from sfedlora.federation.round import ClientEvaluated, RoundFinished, RoundStarted
from support.command_line import sfedlora, write_config

Capsys = pytest.CaptureFixture[str]
NUM_CLIENTS, COHORT_SIZE, NUM_ROUNDS = 10_000, 10, 3


def _rows(path: Path, num_rows: int) -> Path:
    path.write_text("".join(f'{{"text": "a boat on river {i % 97}"}}\n' for i in range(num_rows)), encoding="utf-8")
    return path


def _many(folder: Path, num_clients: int) -> Path:
    return write_config(
        folder / "run.yaml",
        data={
            "source": str(_rows(folder / "rows.jsonl", 3 * num_clients)),
            "columns": {"prompt": None, "response": "text"},
        },
        partition={"scheme": "iid", "column": None, "num_clients": num_clients, "min_examples": 3},
        rounds={"num_rounds": NUM_ROUNDS, "cohort_size": COHORT_SIZE},
        evaluation={"clients": "cohort"},
        output=str(folder / "run"),
    )


def test_ten_thousand_clients(tmp_path: Path, capsys: Capsys) -> None:
    outcome = sfedlora(capsys, "run", _many(tmp_path, NUM_CLIENTS))
    assert outcome.code == 0, outcome.err
    here = tmp_path / "run"
    lines = [json.loads(line) for line in (here / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(len(line["cohort"]), sorted(line["clients"])) for line in lines] == [
        (COHORT_SIZE, sorted(line["cohort"])) for line in lines
    ]
    took_part = {client_id for line in lines for client_id in line["cohort"]}
    assert len(took_part) > 2 * COHORT_SIZE
    stored = list((here / "checkpoints" / "personal").rglob("*.safetensors"))
    assert {path.stem for path in stored} == took_part
    assert {path.name for path in (here / "adapters" / "clients").iterdir()} == took_part
    summary = json.loads((here / "summary.json").read_text(encoding="utf-8"))
    assert summary["store_bytes"] == sum(path.stat().st_size for path in stored)
    assert "clients' state on disk: " in outcome.out
    assert len(json.loads((here / "partition.json").read_text(encoding="utf-8"))["clients"]) == NUM_CLIENTS


def test_the_initial_evaluation_asks_the_cohort_only(tmp_path: Path) -> None:
    evaluated: list[str] = []
    for event in run_events(RunConfig.load(_many(tmp_path, 60))):
        if isinstance(event, ClientEvaluated):
            evaluated.append(event.client_id)
        if isinstance(event, RoundStarted):
            assert evaluated == [*event.cohort, *event.cohort], "on validation and on test"
            return


def _stopped_after(config: Path, round_num: int) -> None:
    events: Iterator[RunEvent] = run_events(RunConfig.load(config))
    for event in events:
        if isinstance(event, RoundFinished) and event.record["round_num"] == round_num:
            with pytest.raises(Interrupted):
                cast("Any", events).throw(Interrupted("stop"))
            return


def _cut(path: Path, other: Path) -> None:
    del other
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda path, _: path.unlink(), "cannot be read"),
    "cut off": (_cut, "damaged"),
    "from another run": (lambda path, other: shutil.copy(other, path), "another run, client or round"),
}


@pytest.mark.parametrize("kind", ["personal", "optimizer"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_client_file_that_is_not_the_one_is_named_and_the_round_before_is_used(
    damage: str, kind: str, tmp_path: Path, capsys: Capsys
) -> None:
    act, message = DAMAGES[damage]
    for name, seed in (("here", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        config = write_config(
            tmp_path / name / "run.yaml",
            rounds={"num_rounds": 3, "cohort_size": 3},
            local={"optimizer_state": "keep"},
            seed=seed,
            output=str(tmp_path / name / "run"),
        )
        _stopped_after(config, 2)
    here = tmp_path / "here" / "run"
    path = min((here / "checkpoints" / kind / "000002").iterdir())
    act(path, tmp_path / "other" / path.relative_to(tmp_path / "here"))
    outcome = sfedlora(capsys, "resume", here)
    assert outcome.code == 0, outcome.err
    [warning] = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert f"the checkpoint of round 2 is damaged ({path}: " in warning
    assert message in warning
    assert warning.endswith("the state after round 1 is used instead")
    assert "round 2/3" in outcome.err
