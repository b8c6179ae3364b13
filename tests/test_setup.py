"""From a configuration to a federation: what every `auto` becomes, and which N enters gamma."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from sfedlora import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.setup import Prepared, prepare
from sfedlora.types import Part, select_parts
from support.command_line import TINY


def _prepare(**keys: Any) -> Prepared:
    values: dict[str, Any] = copy.deepcopy(dict(TINY))
    for dotted, value in keys.items():
        section, _, key = dotted.partition("__")
        values[section] = {**values.get(section, {}), key: value} if key else value
    return prepare(RunConfig.from_mapping(values))


def test_every_auto_is_resolved() -> None:
    prepared = _prepare(preset=None, partition__num_clients=None)
    config = prepared.config
    assert (config.lora.init, config.method.head, config.runner, config.clients_per_batch) == (
        "independent",
        "personal",
        "batched",
        5,
    )
    assert (config.model.dtype, config.device, config.threads) == ("float32", "cpu", 1)
    assert (config.partition.num_clients, config.evaluation.clients) == (8, "all")
    assert _prepare(preset=None, lora__scaling="rslora").config.lora.init == "shared"
    assert _prepare(method__name="fedit").config.method.head == "shared"


def test_above_a_hundred_clients_a_sample_is_evaluated() -> None:
    prepared = _prepare(partition={"scheme": "iid", "num_clients": 120, "min_examples": 3})
    assert prepared.config.evaluation.clients == 100


def test_the_adapter_begins_with_zero_b_and_the_averaged_a() -> None:
    federation = _prepare().federation
    assert all(not tensor.any() for tensor in select_parts(federation.initial, [Part.B]).values())
    sizes = [len(split.train) for split in federation.splits.values()]
    count = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    assert federation.effective_clients == pytest.approx(count)
    for tensor in select_parts(federation.initial, [Part.A]).values():
        variance = float(tensor.double().var())
        assert variance == pytest.approx(1 / (3 * tensor.shape[1] * count), rel=0.5)


@pytest.mark.parametrize(
    ("chosen", "expected"), [("effective", 3.0), ("total", 3.0), (2.5, 2.5)], ids=["effective", "total", "fixed"]
)
def test_the_number_of_clients_in_gamma(chosen: Any, expected: float) -> None:
    prepared = _prepare(rounds__weighting="uniform", lora__num_clients=chosen)
    assert prepared.scaling_clients == pytest.approx(expected)
    assert prepared.federation.sizes.server.scaling == pytest.approx(8 * (expected / 4) ** 0.5)


def test_a_cohort_counts_only_for_local_initialisation() -> None:
    rounds = {"num_rounds": 2, "cohort_size": 2, "weighting": "uniform"}
    assert _prepare(rounds=rounds, lora__init="local").federation.effective_clients == pytest.approx(2)
    assert _prepare(rounds=rounds).federation.effective_clients == pytest.approx(3)


def test_one_client_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = _prepare(partition={"scheme": "iid", "num_clients": 1})
    assert prepared.federation.sizes.server.scaling == pytest.approx(8 / 2)


def test_the_same_configuration_prepares_the_same_federation() -> None:
    first, second = _prepare(), _prepare()
    assert first.partition == second.partition
    assert all(
        torch.equal(first.federation.initial[name], second.federation.initial[name])
        for name in first.federation.initial
    )


def test_other_clients_do_not_change_a_clients_split() -> None:
    two, three = (_prepare(partition__num_clients=number).federation.splits for number in (2, 3))
    shared = two.keys() & three.keys()
    assert len(shared) == 2
    assert all(two[client] == three[client] for client in shared)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device: 'warp'"):
        _prepare(device="warp")
