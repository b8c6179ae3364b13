"""Gamma by hand-computed numbers, against stock PEFT's own layer, and hostile weights."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sfedlora.errors import ConfigError
from sfedlora.lora.scaling import effective_clients, peft_config, scaling_factor


@pytest.mark.parametrize(
    ("rule", "alpha", "rank", "num_clients", "expected"),
    [
        ("lora", 16, 8, 1, 2.0),
        ("lora", 16, 8, 20, 2.0),
        ("rslora", 16, 64, 1, 2.0),
        ("rslora", 16, 64, 20, 2.0),
        ("sfed", 16, 64, 1, 2.0),
        ("sfed", 16, 512, 20, 3.1622776601683795),
        ("sfed", 0.5, 9, 2.25, 0.25),
    ],
)
def test_hand_computed_values(rule: str, alpha: float, rank: int, num_clients: float, expected: float) -> None:
    assert scaling_factor(rule, alpha=alpha, rank=rank, num_clients=num_clients) == pytest.approx(expected, rel=1e-15)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["lora", "rslora", "sfed"])
@pytest.mark.parametrize(("alpha", "rank", "num_clients"), [(16, 8, 20.0), (3.7, 128, 7.31), (1, 1, 1.0)])
def test_stock_peft_computes_the_same_bits(rule: str, alpha: float, rank: int, num_clients: float) -> None:
    config = peft_config(rule, alpha=alpha, rank=rank, num_clients=num_clients)  # type: ignore[arg-type]
    config.target_modules = {"0"}
    layer = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 4)))[0]
    assert layer.scaling["default"] == scaling_factor(rule, alpha=alpha, rank=rank, num_clients=num_clients)  # type: ignore[arg-type]


def test_peft_config_passes_its_settings_on() -> None:
    config = peft_config(
        "sfed",
        alpha=16,
        rank=512,
        num_clients=20,
        target_modules=("q_proj", "v_proj"),
        dropout=0.1,
        task_type="SEQ_CLS",
        modules_to_save=("score",),
    )
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora) == (512, 16 * math.sqrt(20), True)
    assert (config.target_modules, config.lora_dropout) == ({"q_proj", "v_proj"}, 0.1)
    assert (config.task_type, config.modules_to_save) == ("SEQ_CLS", ["score"])
    assert peft_config("lora", alpha=16, rank=8, target_modules="all-linear").target_modules == "all-linear"
    assert peft_config("lora", alpha=16, rank=8).use_rslora is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "dora"}, "scaling 'dora'; expected one of lora, rslora, sfed"),
        ({"rank": 0}, "rank = 0"),
        ({"rank": 2.0}, "rank = 2.0"),
        ({"rank": True}, "rank = True"),
        ({"alpha": -1}, "alpha = -1"),
        ({"alpha": 0}, "alpha = 0"),
        ({"alpha": math.nan}, "alpha = nan"),
        ({"num_clients": 0.5}, "num_clients = 0.5"),
        ({"num_clients": math.inf}, "num_clients = inf"),
    ],
)
def test_values_outside_their_range_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"alpha": 16, "rank": 8, "num_clients": 4} | change
    rule = arguments.pop("rule", "sfed")
    with pytest.raises(ConfigError, match=message):
        scaling_factor(rule, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        peft_config(rule, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_outside_its_range_is_refused(dropout: float) -> None:
    with pytest.raises(ConfigError, match="dropout"):
        peft_config("lora", alpha=1, rank=1, dropout=dropout)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0], 1.0),
        ([0.25] * 4, 4.0),
        ([7, 7, 7], 3.0),
        ([3, 1], 1.6),  # 1 / (9/16 + 1/16)
        ([1, 0, 0], 1.0),
        ([1e300, 1e300], 2.0),
        ([1e-300, 1e-300, 1e-300], 3.0),
        ([1, 1e-200], 1.0),
    ],
)
def test_effective_clients_by_hand(weights: list[float], expected: float) -> None:
    assert effective_clients(weights) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda weights: max(weights) > 0))
def test_effective_clients_lies_between_one_and_all(weights: list[float]) -> None:
    assert 1 <= effective_clients(weights) <= len(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "no client weights"),
        ([1, -1], "position 1"),
        ([math.nan], "nan"),
        ([math.inf, 1], "inf"),
        ([0, 0], "are 0"),
    ],
)
def test_hostile_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        effective_clients(weights)
