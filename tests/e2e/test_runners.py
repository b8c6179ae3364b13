"""Whole runs with several clients in one forward pass, from the command line, beside runs of one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sfedlora import RunConfig, run
from sfedlora.errors import Interrupted
from sfedlora.experiment import RunPrepared, resume_events, run_events
from sfedlora.federation.round import ClientTrained
from sfedlora.lora.layer import LoraLinear
from support.command_line import sfedlora, write_config
from support.sentiment import write_sentiment

Capsys = pytest.CaptureFixture[str]

PRESETS = {
    "sfed-lora": [],
    "fedit": ["local.optimizer_state=keep"],
    "flora": ["local.max_grad_norm=0.1"],
    "fedex-lora": ["local.local_steps=2", "local.accumulation=2"],
    "rolora": ["rounds.proximal_mu=0.1"],
    "hetlora": ["lora.rank=[2, 4, 6, 8, 3]", "local.optimizer_state=keep"],
}
RUNNER_KEYS = {"padded_tokens", "clients_per_batch"}
"""What the runner decides. All other integers, names and lists of a metrics line are the same for both."""


def chat(folder: Path, **sections: object) -> Path:
    return write_config(
        folder / "run.yaml",
        rounds={"num_rounds": 3, "cohort_size": 4},
        partition={"num_clients": 5},
        lora={"rank": 4, "alpha": 8, "dropout": 0.1},
        local={"learning_rate": 1e-2, "local_steps": 4, "batch_size": 2},
        output=str(folder / "run"),
        **sections,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if "_seconds" not in key} for line in lines]


def largest_difference(serial: Any, batched: Any) -> float:
    """Relative difference of the numbers with a fraction; everything else must be equal."""
    if isinstance(serial, dict):
        assert serial.keys() == batched.keys()
        return max([largest_difference(serial[key], batched[key]) for key in serial if key not in RUNNER_KEYS] or [0.0])
    if isinstance(serial, float) and isinstance(batched, float):
        return abs(serial - batched) / max(abs(serial), 1e-9)
    assert serial == batched
    return 0.0


def assert_runners_agree(capsys: Capsys, config: Path, overrides: list[str], clients_per_batch: int) -> None:
    records = {}
    for runner in ("serial", "batched"):
        output = config.parent / runner
        outcome = sfedlora(capsys, "run", config, *overrides, f"runner={runner}", f"output={output}")
        assert outcome.code == 0, outcome.err
        records[runner] = metrics(output)
    assert [record["clients_per_batch"] for record in records["serial"]] == [1] * 3
    assert [record["clients_per_batch"] for record in records["batched"]] == [clients_per_batch] * 3
    for serial, batched in zip(records["serial"], records["batched"], strict=True):
        assert largest_difference(serial, batched) < 1e-5  # the bar is 1e-3; measured 3e-7


@pytest.mark.parametrize("preset", PRESETS)
def test_chat(preset: str, tmp_path: Path, capsys: Capsys) -> None:
    assert_runners_agree(capsys, chat(tmp_path), [f"preset={preset}", *PRESETS[preset]], 4)


@pytest.mark.parametrize("preset", ["sfed-lora", "fedit"])
def test_sentiment_with_a_head(preset: str, tmp_path: Path, capsys: Capsys) -> None:
    config = write_sentiment(tmp_path, rounds={"num_rounds": 3}, lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    assert_runners_agree(capsys, config, [f"preset={preset}", "local.batch_size=4"], 3)


def test_the_configuration_that_is_written_says_how_it_ran(tmp_path: Path, capsys: Capsys) -> None:
    assert sfedlora(capsys, "run", chat(tmp_path), "clients_per_batch=3").code == 0
    resolved = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert (resolved.runner, resolved.clients_per_batch) == ("batched", 3)


# stopped and resumed


def stacked_config(folder: Path) -> Path:
    """A cohort of five in stacks of two; unequal numbers of steps, ranks, kept moments and dropout."""
    return chat(
        folder,
        preset="fedsa-rslora",
        runner="batched",
        clients_per_batch=2,
    )


OVERRIDES = ["rounds.cohort_size=5", "lora.rank=[2, 4, 3, 4, 1]", "local.optimizer_state=keep"]
OVERRIDES += ["local.local_steps=null", "local.local_epochs=1", "rounds.num_rounds=2", "local.batch_size=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without interruption."""
    config = stacked_config(tmp_path_factory.mktemp("whole"))
    return run(RunConfig.load(config, OVERRIDES)).run_dir


def stop_after(events: Iterator[Any], number: int) -> list[str]:
    """Throw `Interrupted` after so many trained clients, as the command line does; the clients so far."""
    trained: list[str] = []
    for event in events:
        if isinstance(event, ClientTrained):
            trained.append(event.client_id)
        if len(trained) == number:
            with pytest.raises(Interrupted):
                cast("Any", events).throw(Interrupted("stop"))
            break
    return trained


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert metrics(run_dir) == metrics(whole)
    adapters = sorted(path.relative_to(whole) for path in whole.glob("adapters/**/*.safetensors"))
    assert len(adapters) == 6
    for path in adapters:
        ours, theirs = load_file(run_dir / path), load_file(whole / path)
        assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_a_stop_after_any_client_resumes_to_the_same_bits(number: int, whole: Path, tmp_path: Path) -> None:
    # One client of a stack may be done and the other not; the stack is then trained again as it was.
    run_dir = tmp_path / "run"
    before = stop_after(run_events(RunConfig.load(stacked_config(tmp_path), OVERRIDES)), number)
    assert len(before) == number
    after = [event.client_id for event in resume_events(run_dir) if isinstance(event, ClientTrained)]
    assert sorted(after[:5]) == sorted(set(after)), "every client of the round is reported once"
    assert_same_run(run_dir, whole)


def test_stopped_twice_in_one_round(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop_after(run_events(RunConfig.load(stacked_config(tmp_path), OVERRIDES)), 3)
    stop_after(resume_events(run_dir), 3)
    list(resume_events(run_dir))
    assert_same_run(run_dir, whole)


def _renew_checksums(folder: Path) -> None:
    """Make edited files the ones that were written, as far as checksums tell."""
    names = [path.name for path in folder.iterdir() if path.name != "checksums.sha256"]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checksums.sha256").write_text("".join(lines), encoding="utf-8")


def test_finished_stacks_are_used_and_unfinished_ones_done_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first, second, third = stop_after(run_events(RunConfig.load(stacked_config(tmp_path), OVERRIDES)), 3)
    for path in (run_dir / "checkpoints" / "partial").glob("*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["metrics"]["train_loss"] = 1234.5
        path.write_text(json.dumps(facts), encoding="utf-8")
    _renew_checksums(run_dir / "checkpoints" / "partial")
    list(resume_events(run_dir))
    clients = metrics(run_dir)[0]["clients"]
    assert [clients[name]["train_loss"] == 1234.5 for name in (first, second, third)] == [True, True, False]


def with_little_memory(events: Iterator[Any], *, when_training: bool) -> Iterator[Any]:
    """The events of a run whose model holds three clients in one pass and no more, always or in training only."""

    def check(layer: nn.Module, _: object) -> None:
        assert isinstance(layer, LoraLinear)
        if layer.a.ndim == 3 and layer.a.shape[0] > 3 and (torch.is_grad_enabled() or not when_training):
            raise torch.OutOfMemoryError("CUDA out of memory")

    for event in events:
        if isinstance(event, RunPrepared):
            resident = event.prepared.federation.resident
            layer = resident.model.get_submodule(resident.layout.targets[0].path)
            layer.register_forward_pre_hook(check)
        try:
            yield event
        except Interrupted as stop:
            cast("Any", events).throw(stop)
            raise


@pytest.mark.parametrize("when_training", [True, False])
def test_a_run_with_little_memory_goes_on_with_fewer_clients_also_when_resumed(
    when_training: bool, tmp_path: Path
) -> None:
    overrides = ["clients_per_batch=4", "runner=batched", "rounds.cohort_size=5"]
    for name in ("whole", "stopped", "plenty"):
        (tmp_path / name).mkdir()
    halved = pytest.warns(UserWarning, match=r"4 clients in one batch .* \(OutOfMemoryError\); going on with 2")
    with halved:
        list(
            with_little_memory(
                run_events(RunConfig.load(chat(tmp_path / "whole"), overrides)), when_training=when_training
            )
        )
    whole = tmp_path / "whole" / "run"
    assert [record["clients_per_batch"] for record in metrics(whole)] == [2, 2, 2]

    config = RunConfig.load(chat(tmp_path / "stopped"), overrides)
    with halved:
        stop_after(with_little_memory(run_events(config), when_training=when_training), 6)
    stopped = tmp_path / "stopped" / "run"
    list(
        with_little_memory(resume_events(stopped), when_training=when_training)
    )  # without a warning, which would be an error
    assert_same_run(stopped, whole)

    plenty = run(RunConfig.load(chat(tmp_path / "plenty"), overrides)).run_dir
    assert [record["clients_per_batch"] for record in metrics(plenty)] == [4, 4, 4]
    for little, much in zip(metrics(whole), metrics(plenty), strict=True):
        assert largest_difference(much, little) < 1e-5
