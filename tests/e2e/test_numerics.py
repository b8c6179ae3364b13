"""Quantised bases and cheaper matrix products, run from the library's front door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfedlora import RunConfig, run
from support.command_line import write_config


def gradients(tmp_path: Path, name: str, **model: Any) -> tuple[list[float], list[float]]:
    """|grad B| and evaluation loss of two rounds on the packaged tiny model."""
    config = write_config(tmp_path / f"{name}.yaml", rounds={"num_rounds": 2}, output=str(tmp_path / name))
    loaded = RunConfig.load(config, [f"model.{key}={value}" for key, value in model.items()])
    metrics = run(loaded).metrics
    return [line["grad_norm_b"] for line in metrics], [line["eval_loss"] for line in metrics]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "tolerance"), [("8bit", 0.1), ("4bit", 0.4)])
def test_a_quantised_base_trains_like_the_whole_one(
    quantization: str, tolerance: float, dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    plain_norms, plain_losses = gradients(tmp_path, "plain", dtype=dtype)
    norms, losses = gradients(tmp_path, "quantised", dtype=dtype, quantization=quantization)
    assert norms == pytest.approx(plain_norms, rel=tolerance)
    assert losses == pytest.approx(plain_losses, abs=0.1)
    assert norms != plain_norms


def test_the_precision_of_products_is_the_runs_own(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    exact, _ = gradients(tmp_path, "exact", dtype="float32")
    medium, _ = gradients(tmp_path, "medium", dtype="float32", matmul_precision="medium")
    assert medium == pytest.approx(exact, rel=0.02)
    assert torch.get_float32_matmul_precision() == before
