"""Privacy and robust rules through configuration, run directory and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfedlora import RunConfig, run
from sfedlora.errors import ConfigError, Interrupted
from sfedlora.experiment import resume, run_events
from sfedlora.federation.round import RoundFinished
from sfedlora.privacy.mechanism import NOISE_KEY
from support.command_line import sfedlora, write_config

Capsys = pytest.CaptureFixture[str]

PRIVATE = ["rounds.weighting=uniform", "privacy.mode=central", "privacy.clip_norm=0.1", "privacy.noise_multiplier=2"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", rounds={"num_rounds": 3}, output=str(tmp_path / "run"))


def shared(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapters" / "shared" / "adapter_model.safetensors")


def same(left: Path, right: Path) -> bool:
    first, second = shared(left), shared(right)
    return first.keys() == second.keys() and all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("mode", ["central", "local"])
def test_a_stopped_private_run_ends_with_the_bits_it_would_have_had(mode: str, config: Path, tmp_path: Path) -> None:
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    events = run_events(RunConfig.load(config, [*PRIVATE, f"privacy.mode={mode}"]))
    for event in events:
        if isinstance(event, RoundFinished):
            with pytest.raises(Interrupted):
                events.throw(Interrupted())  # type: ignore[attr-defined]
            break
    shutil.copytree(run_dir, copy)
    for folder in (run_dir, copy):
        resume(folder)
    assert same(run_dir, copy)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    spent = [record["privacy"]["epsilon"] for record in records]
    assert len(spent) == 3
    assert spent == sorted(spent)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["privacy"] == records[-1]["privacy"]


def test_the_key_of_the_noise_is_among_the_checkpoints_and_nowhere_else(config: Path, tmp_path: Path) -> None:
    run(RunConfig.load(config, [*PRIVATE]))
    run_dir = tmp_path / "run"
    [key] = {
        load_file(path)[f"extra/{NOISE_KEY}"].numpy().tobytes()
        for path in (run_dir / "checkpoints").glob("round-*/server.safetensors")
    }
    holders = {path for path in run_dir.rglob("*") if path.is_file() and key in path.read_bytes()}
    assert holders
    assert all("checkpoints" in path.parts for path in holders)
    assert not any(key.hex() in path.read_text(encoding="utf-8") for path in run_dir.glob("*.json*"))


def test_secret_noise_differs_from_run_to_run_and_seeded_noise_repeats(config: Path, tmp_path: Path) -> None:
    for name, noise in (("s1", "secret"), ("s2", "secret"), ("n1", "seeded"), ("n2", "seeded")):
        overrides = [*PRIVATE, f"privacy.noise={noise}", "rounds.num_rounds=1", f"output={tmp_path / name}"]
        run(RunConfig.load(config, overrides))
    assert not same(tmp_path / "s1", tmp_path / "s2")
    assert same(tmp_path / "n1", tmp_path / "n2")
    assert not same(tmp_path / "s1", tmp_path / "n1")


@pytest.mark.parametrize("overrides", [["robust=median"], ["robust=trimmed_mean", "robust_attackers=1"]])
def test_a_robust_rule_learns_and_gives_another_adapter(overrides: list[str], config: Path, tmp_path: Path) -> None:
    result = run(RunConfig.load(config, overrides))
    initial, last = (result.summary[when]["validation"]["weighted"]["eval_loss"] for when in ("initial", "last"))
    assert last < initial
    assert result.metrics[0]["effective_cohort_size"] == pytest.approx(3)
    run(RunConfig.load(config, [f"output={tmp_path / 'plain'}"]))
    assert not same(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize("taken", [1, 3])
def test_krum_names_the_clients_it_took(taken: int, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        preset="fedit",
        partition={"scheme": "iid", "column": None, "num_clients": 5},
        output=str(tmp_path / "run"),
    )
    result = run(RunConfig.load(config, ["robust=krum", "robust_attackers=1", f"robust_taken={taken}"]))
    for record in result.metrics:
        assert len(record["robust_selected"]) == record["effective_cohort_size"] == taken
        assert {*record["robust_selected"]} < {*record["cohort"]}
    assert result.summary["last"]["validation"]["weighted"]["eval_loss"] < 10


def test_example_level_privacy_states_what_an_example_spends(config: Path, tmp_path: Path) -> None:
    examples = ["privacy.example_clip_norm=0.1", "privacy.example_noise_multiplier=3", "privacy.noise=seeded"]
    result = run(RunConfig.load(config, [*examples, "rounds.num_rounds=2", "clients_per_batch=auto"]))
    resolved = RunConfig.load(tmp_path / "run" / "config.yaml")
    assert (resolved.runner, resolved.clients_per_batch) == ("serial", 1)
    spent = [record["example_privacy"]["epsilon"] for record in result.metrics]
    assert 0 < spent[0] < spent[1]
    assert result.summary["example_privacy"] == result.metrics[-1]["example_privacy"]
    assert "privacy" not in result.metrics[0]
    again = run(RunConfig.load(config, [*examples, "rounds.num_rounds=2", f"output={tmp_path / 'again'}"]))
    assert same(tmp_path / "run", tmp_path / "again")
    assert again.metrics[0]["train_loss"] == result.metrics[0]["train_loss"]


LEAST: dict[str, Any] = {
    "model": {"source": "m"},
    "data": {"source": "d"},
    "partition": {"scheme": "iid", "num_clients": 10},
    "rounds": {"weighting": "uniform"},
}
CENTRAL = {"mode": "central", "clip_norm": 1.0, "noise_multiplier": 1.0}
LOCAL = {**CENTRAL, "mode": "local"}
EXAMPLES = {"example_clip_norm": 1.0, "example_noise_multiplier": 1.0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights by examples": ({"privacy": CENTRAL, "rounds": {}}, "rounds.weighting: uniform"),
    "local, weights by examples": ({"privacy": LOCAL, "rounds": {}}, "rounds.weighting: uniform"),
    "central on no mean": ({"privacy": CENTRAL, "method": {"name": "fedex"}, "lora": {"init": "shared"}}, "'fedex'"),
    "nothing is sent": ({"privacy": LOCAL, "method": {"name": "local"}}, "sends nothing"),
    "pooled data": ({"privacy": CENTRAL, "method": {"name": "centralized"}}, "sends nothing"),
    "own beginnings": ({"privacy": CENTRAL, "lora": {"init": "local"}}, "lora.init: local"),
    "several ranks": ({"privacy": CENTRAL, "lora": {"rank": [4, 8], "rank_assignment": "drawn"}}, "one rank"),
    "no clipping norm": ({"privacy": {"mode": "central", "noise_multiplier": 1.0}}, "privacy.clip_norm"),
    "no noise": ({"privacy": {"mode": "local", "clip_norm": 1.0}}, "privacy.noise_multiplier"),
    "zero noise": ({"privacy": {**CENTRAL, "noise_multiplier": 0.0}}, "noise_multiplier: .*greater than 0"),
    "delta 0": ({"privacy": {**CENTRAL, "delta": 0.0}}, "delta"),
    "delta 1": ({"privacy": {**CENTRAL, "delta": 1.0}}, "delta"),
    "keys without a mode": ({"privacy": {"clip_norm": 1.0}}, "not used by mode: none"),
    "half of example-level privacy": ({"privacy": {"example_clip_norm": 1.0}}, "give both of example_clip_norm"),
    "examples twice in a step": ({"privacy": EXAMPLES, "local": {"accumulation": 2}}, "local.accumulation: 1"),
    "examples of several clients": ({"privacy": EXAMPLES, "runner": "batched"}, "one client at a time"),
    "examples, several ranks": (
        {"privacy": EXAMPLES, "lora": {"rank": [4, 8], "rank_assignment": "drawn"}},
        "one rank for all clients",
    ),
    "median and central noise": ({"robust": "median", "privacy": CENTRAL}, "cannot go with privacy.mode: central"),
    "krum and central noise": (
        {"robust": "krum", "robust_attackers": 2, "privacy": CENTRAL},
        "cannot go with privacy.mode: central",
    ),
    "median of two factors": ({"robust": "median", "method": {"name": "fedit"}}, "shares A and B.*use krum"),
    "median of products": ({"robust": "median", "method": {"name": "flora"}}, "server step of method 'flora'"),
    "robust alone": ({"robust": "krum", "robust_attackers": 1, "method": {"name": "local"}}, "does not send"),
    "robust, several ranks": (
        {"robust": "median", "lora": {"rank": [4, 8], "rank_assignment": "drawn"}},
        "one rank for all clients",
    ),
    "robust, own beginnings": ({"robust": "median", "lora": {"init": "local"}}, "lora.init: local"),
    "no number of attackers": ({"robust": "trimmed_mean"}, "needs robust_attackers"),
    "attackers without a rule": ({"robust_attackers": 2}, "not used by robust: none"),
    "attackers of a median": ({"robust": "median", "robust_attackers": 2}, "not used by robust: median"),
    "too many attackers": ({"robust": "trimmed_mean", "robust_attackers": 5}, "at least 11 clients in a round, got 10"),
    "too many for krum": ({"robust": "krum", "robust_attackers": 4}, "at least 11 clients in a round, got 10"),
    "taking hostile ones": ({"robust": "krum", "robust_attackers": 2, "robust_taken": 9}, "at most 8"),
    "taking by a median": ({"robust": "median", "robust_taken": 2}, "robust: krum alone"),
    "too small a cohort": (
        {"robust": "krum", "robust_attackers": 1, "rounds": {"cohort_size": 4}},
        "at least 5 clients in a round, got 4",
    ),
    "no such rule": ({"robust": "mean"}, "robust"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_message(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.from_mapping({**LEAST, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"robust": "median", "rounds": {}},
        {"robust": "trimmed_mean", "robust_attackers": 4},
        {"robust": "krum", "robust_attackers": 3, "method": {"name": "flora"}},
        {"robust": "median", "privacy": LOCAL},
        {"privacy": EXAMPLES, "method": {"name": "local"}, "rounds": {}},
        {"privacy": {**CENTRAL, **EXAMPLES}},
        {"privacy": LOCAL, "lora": {"rank": [4, 8], "rank_assignment": "drawn"}},
        {"privacy": CENTRAL, "rounds": {"weighting": "uniform", "server_optimizer": "fedadam"}},
    ],
    ids=str,
)
def test_what_makes_sense_is_taken(changes: dict[str, Any]) -> None:
    config = RunConfig.from_mapping({**LEAST, **changes})
    assert config.from_mapping(config.model_dump(mode="json")) == config


def test_the_number_of_clients_of_a_column_is_checked_once_it_is_known(config: Path, capsys: Capsys) -> None:
    overrides = ("partition.num_clients=null", "robust=krum", "robust_attackers=9")
    outcome = sfedlora(capsys, "run", config, *overrides)
    assert outcome.code == 2
    assert "needs at least 21 clients in a round" in outcome.err
    assert "Traceback" not in outcome.err
