"""Server optimizers, the proximal term, and settings that make no sense, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfedlora import RunConfig, run
from support.command_line import sfedlora, write_config

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", rounds={"num_rounds": 3}, output=str(tmp_path / "run"), preset=None)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_server_optimizer_learns_and_auto_is_written_as_a_number(name: str, config: Path, tmp_path: Path) -> None:
    result = run(RunConfig.load(config, ["preset=sfed-lora", f"rounds.server_optimizer={name}"]))
    resolved = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert resolved.rounds.server_learning_rate == (1.0 if name == "fedavgm" else 0.01)
    assert resolved.rounds.server_optimizer == name
    initial, last = (result.summary[when]["validation"]["weighted"]["eval_loss"] for when in ("initial", "last"))
    assert last < initial
    plain = run(RunConfig.load(config, ["preset=sfed-lora", f"output={tmp_path / 'plain'}"]))
    with_it, without = (load_file(r.adapter() / "adapter_model.safetensors") for r in (result, plain))
    assert any(not torch.equal(tensor, without[key]) for key, tensor in with_it.items())


def test_a_diverging_server_optimizer_is_a_failed_run_that_says_why(config: Path, capsys: Capsys) -> None:
    overrides = ("preset=sfed-lora", "rounds.server_optimizer=fedavgm", "rounds.server_learning_rate=1e30")
    outcome = sfedlora(capsys, "run", config, *overrides, "rounds.num_rounds=9")
    assert outcome.code == 3
    assert "round 2" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_proximal_term_holds_the_shared_factor(config: Path, tmp_path: Path) -> None:
    moved = []
    for mu in (0, 50):
        overrides = [
            "preset=sfed-lora",
            f"rounds.proximal_mu={mu}",
            f"output={tmp_path / str(mu)}",
            "rounds.num_rounds=1",
        ]
        fixed = ["local.optimizer=sgd", "local.local_steps=4"]
        result = run(RunConfig.load(config, [*overrides, *fixed]))
        before = run(
            RunConfig.load(config, [*overrides, *fixed, "local.learning_rate=1e-20", f"output={tmp_path / f'{mu}-0'}"])
        )
        end, start = (load_file(r.adapter() / "adapter_model.safetensors") for r in (result, before))
        moved.append(sum(float((end[key] - start[key]).square().sum()) for key in end if "lora_A" in key))
    assert 0 < moved[1] < 0.7 * moved[0]


REFUSED = {
    "flexlora with sfed": (["preset=flexlora", "lora.scaling=sfed"], "'flexlora' gives A orthonormal rows"),
    "flexlora above the rank": (["preset=flexlora", "lora.rank=400"], "lora.rank: 400 is above min"),
    "flexlora with momentum": (
        ["preset=flexlora", "rounds.server_optimizer=fedavgm"],
        "'flexlora' does not have",
    ),
    "rolora with own draws": (["preset=rolora", "lora.init=local"], "freezes one A"),
    "an unknown optimizer": (["rounds.server_optimizer=adam"], "rounds.server_optimizer"),
    "momentum 1": (["rounds.server_momentum=1"], "rounds.server_momentum"),
    "tau 0": (["rounds.server_tau=0"], "rounds.server_tau"),
    "rate 0": (["rounds.server_learning_rate=0"], "rounds.server_learning_rate"),
    "a negative mu": (["rounds.proximal_mu=-1"], "rounds.proximal_mu"),
    "mu nan": (["rounds.proximal_mu=.nan"], "rounds.proximal_mu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, config: Path, tmp_path: Path, capsys: Capsys) -> None:
    overrides, words = REFUSED[case]
    outcome = sfedlora(capsys, "run", config, *overrides)
    assert outcome.code == 2, outcome.err
    assert words in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()
