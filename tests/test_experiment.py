"""What a run keeps constant, and what it calls its best round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sfedlora.artifacts import RunDirectory
from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError, Interrupted
from sfedlora.experiment import resume, run, run_events
from sfedlora.federation.round import RoundFinished
from support.command_line import sfedlora, write_config


def stopped_after_round_1(tmp_path: Path, **sections: object) -> Path:
    output = tmp_path / "run"
    config = RunConfig.load(write_config(tmp_path / "run.yaml", output=str(output), **sections))
    for event in (events := run_events(config)):
        if isinstance(event, RoundFinished):
            break
    with pytest.raises(Interrupted):
        events.throw(Interrupted("stop"))  # type: ignore[attr-defined]
    return output


def test_an_edited_config_is_refused_on_resume(tmp_path: Path) -> None:
    output = stopped_after_round_1(tmp_path)
    path = output / "config.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("alpha: 8.0", "alpha: 80.0"))
    assert path.read_text() != whole
    with pytest.raises(ConfigError, match=r"config\.yaml: was edited since the run began"):
        resume(output)
    path.write_text(whole)
    assert len(resume(output).metrics) == 2


def test_a_run_directory_may_be_moved(tmp_path: Path) -> None:
    output = stopped_after_round_1(tmp_path)
    moved = output.rename(tmp_path / "elsewhere")
    assert resume(moved).run_dir == moved


def test_a_run_leaves_the_process_with_its_thread_count(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(RunConfig.load(write_config(tmp_path / "run.yaml", output=str(tmp_path / "run"), threads=1)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    # one enormous step: the client's factors stay finite, the loss with them does not
    output = tmp_path / "run"
    path = write_config(
        tmp_path / "run.yaml",
        output=str(output),
        local={"optimizer": "sgd", "learning_rate": 1e22, "local_steps": 1},
        lora={"target_modules": ["q_proj", "k_proj"]},
        rounds={"num_rounds": 1, "cohort_size": 1},
    )
    (line,) = run(RunConfig.load(path)).metrics
    assert line["eval_loss"] is None
    state = json.loads((output / "checkpoints" / "round-000001" / "state.json").read_text())
    assert state["progress"]["best_round"] is None
    assert state["progress"]["best_loss"] is None


def test_metrics_name_the_training_examples_of_every_evaluated_client(tmp_path: Path) -> None:
    output = tmp_path / "run"
    path = write_config(tmp_path / "run.yaml", output=str(output), rounds={"cohort_size": 1}, evaluation={"every": 2})
    first, second = run(RunConfig.load(path)).metrics
    partition = RunDirectory.open(output).partition()["clients"]
    assert {key: value["num_examples"] for key, value in second["clients"].items()} == {
        key: len(value["train"]) for key, value in partition.items()
    }
    assert first["eval_loss"] is None
    assert first["perplexity"] is None
    assert second["perplexity"] > 1.0


def test_centralized_records_its_one_draw(tmp_path: Path) -> None:
    output = tmp_path / "run"
    path = write_config(
        tmp_path / "run.yaml", output=str(output), method={"name": "centralized"}, lora={"scaling": "rslora"}
    )
    with pytest.warns(UserWarning, match="independent is taken as shared"):
        run(RunConfig.load(path))
    assert RunDirectory.open(output).config().lora.init == "shared"


def test_quick_and_sentiment_are_not_mixed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = sfedlora(capsys, "demo", "--quick", "--task", "sentiment", "--output", tmp_path / "demo")
    assert outcome.code == 2
    assert "--quick is a chat task" in outcome.err
