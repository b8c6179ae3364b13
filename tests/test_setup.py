"""From a configuration to a federation: what every `auto` becomes, and which N enters gamma."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfedlora import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.lora.inject import adapt
from sfedlora.methods import make_method
from sfedlora.setup import Prepared, prepare
from sfedlora.setup.adapter import client_ranks
from sfedlora.setup.resolve import resolve
from sfedlora.types import Part, select_parts
from support.command_line import TINY
from support.tiny_models import tiny_deberta_classifier


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


# Ranks


def ranks_of(prepared: Prepared) -> dict[str, int]:
    return {client: prepared.federation.sizes.of(client).rank for client in prepared.federation.splits}


def test_listed_ranks_go_to_the_clients_in_the_order_of_the_partition() -> None:
    prepared = _prepare(rounds__weighting="uniform", lora__rank=[2, 4, 1])
    federation = prepared.federation
    clients = list(prepared.partition["clients"])
    assert ranks_of(prepared) == dict(zip(clients, (2, 4, 1), strict=True))
    assert federation.sizes.server.rank == federation.resident.rank == 4
    for client, rank in zip(clients, (2, 4, 1), strict=True):  # alpha 8, three effective clients
        assert federation.sizes.of(client).scaling == pytest.approx(8 * (3 / rank) ** 0.5)
    assert federation.sizes.server == federation.sizes.of(clients[1])
    assert {tensor.shape[0] for tensor in select_parts(federation.initial, [Part.A]).values()} == {4}
    scaling = prepared.environment["scaling"]
    assert scaling["ranks"] == dict(zip(clients, (2, 4, 1), strict=True))
    assert scaling["gamma"] == {client: federation.sizes.of(client).scaling for client in sorted(clients)}


@pytest.mark.parametrize("rank", [4, [4, 4, 4]], ids=str)
def test_equal_ranks_are_one_rank(rank: Any) -> None:
    prepared = _prepare(lora__rank=rank)
    assert prepared.federation.sizes.clients == {}
    assert prepared.federation.sizes.server.rank == prepared.environment["scaling"]["ranks"] == 4
    assert prepared.environment["scaling"]["gamma"] == prepared.federation.sizes.server.scaling


def test_as_many_ranks_as_a_column_has_values() -> None:
    words = r"lora\.rank: 2 ranks for 8 clients; give one for each, in the order ai, conversations, .*, trivia-2, or"
    with pytest.raises(ConfigError, match=words):
        _prepare(lora__rank=[4, 2], partition__num_clients=None)


def test_drawn_ranks_depend_on_seed_and_client_alone() -> None:
    def drawn(**keys: Any) -> dict[str, int]:
        lora = {"rank": [1, 2, 3, 4], "rank_assignment": "drawn"}
        return ranks_of(_prepare(lora=lora, partition__num_clients=keys.pop("clients", None), **keys))

    eight = drawn()
    assert eight == drawn()
    assert len(eight) == 8
    assert set(eight.values()) <= {1, 2, 3, 4}
    assert len(set(eight.values())) > 1
    assert eight != drawn(seed=1)
    three = drawn(clients=3)
    assert three == {client: eight[client] for client in three}


def test_drawn_ranks_are_all_equally_likely() -> None:
    config = RunConfig.from_mapping(
        {**TINY, "lora": {"rank": [2, 8, 8], "rank_assignment": "drawn"}, "partition": {"num_clients": 3000}}
    )
    ranks = list(client_ranks(config, [str(number) for number in range(3000)]).values())
    assert set(ranks) == {2, 8}
    assert ranks.count(8) == pytest.approx(2000, abs=4 * (3000 * 2 / 9) ** 0.5)  # four standard deviations


def test_the_server_has_the_largest_rank_that_was_drawn() -> None:
    lora = {"rank": [1, 2, 3, 4, 5, 6], "rank_assignment": "drawn"}
    prepared = _prepare(lora=lora)
    assert prepared.federation.sizes.server.rank == max(ranks_of(prepared).values())


def test_the_largest_rank_is_the_one_that_must_fit() -> None:
    method = {"preset": "flexlora"}
    assert _prepare(**method, lora__rank=[2, 16, 4]).federation.sizes.server.rank == 16
    with pytest.raises(ConfigError, match=r"lora\.rank: 33 is above min\(in_features, out_features\) = 32 of .*v_proj"):
        _prepare(**method, lora__rank=[2, 33, 4])


@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora", "hetlora"])
def test_a_method_that_forms_no_average_of_a_counts_one_client(name: str) -> None:
    # fedex and hetlora average A, but their presets start from one shared draw.
    preset = {"fedex": "fedex-lora"}.get(name, name)
    prepared = _prepare(preset=preset)
    assert prepared.config.lora.init == "shared"
    assert prepared.federation.effective_clients == 1
    assert prepared.federation.sizes.server.scaling == pytest.approx(8 / 4)


def test_sfed_on_flora_is_rslora_and_warns() -> None:
    with pytest.warns(UserWarning, match="method flora: A is not the average of independent draws"):
        prepared = _prepare(preset=None, method__name="flora", lora__scaling="sfed")
    assert prepared.config.lora.init == "shared"
    assert prepared.federation.sizes.server.scaling == pytest.approx(8 / 4**0.5)


def test_a_method_without_an_argument_for_the_head_is_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "headless_method.py").write_text(
        "from sfedlora.methods import FedIT, Traits\n"
        "class Headless:\n"
        "    name, traits = 'headless', Traits(exact='no')\n"
        "    trained_parts = FedIT.trained_parts\n"
        "    shared_parts = FedIT.shared_parts\n"
        "    broadcast_parts = FedIT.broadcast_parts\n"
        "    server_step = FedIT.server_step\n"
        "    def personal_parts(self):\n"
        "        return frozenset()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    prepared = _prepare(preset=None, method__name="headless_method:Headless", lora__scaling="lora")
    assert prepared.config.method.head == "shared"
    assert RunConfig.from_mapping(prepared.config.model_dump(mode="json")) == prepared.config
    assert prepare(prepared.config).config == prepared.config


@pytest.fixture(scope="module")
def tiny() -> Prepared:
    return _prepare()


def _stack(tiny: Prepared, length: int, *, device: str = "cpu", clients: int = 100, **keys: Any) -> tuple[str, Any]:
    """What `runner` and `clients_per_batch` become for examples of a median length."""
    config = tiny.config.with_values(
        {"runner": "auto", "clients_per_batch": "auto", "partition.num_clients": clients}
        | {key.replace("__", "."): value for key, value in keys.items()}
    )
    method = make_method(config.method.name, config.method.head)
    targets = [target.path for target in tiny.federation.resident.layout.targets]
    resolved = resolve(
        config, tiny.base, method, torch.device(device), num_clients=clients, median_length=length, targets=targets
    )
    return resolved.runner, resolved.clients_per_batch


SERIAL = ("serial", 1)
AUTO: dict[str, tuple[int, dict[str, Any], tuple[str, Any]]] = {
    "512 tokens in a pass": (16, {"local__batch_size": 2}, ("batched", 16)),
    "rounded down": (17, {"local__batch_size": 2}, ("batched", 15)),
    "larger batches": (16, {"local__batch_size": 8}, ("batched", 4)),
    "two just fit": (64, {"local__batch_size": 4}, ("batched", 2)),
    "two do not fit": (65, {"local__batch_size": 4}, SERIAL),
    "no more than 64": (1, {"local__batch_size": 1}, ("batched", 64)),
    "no more than a cohort": (16, {"local__batch_size": 2, "rounds__cohort_size": 3}, ("batched", 3)),
    "no more than clients": (16, {"local__batch_size": 2, "clients": 5}, ("batched", 5)),
    "a cohort of one": (16, {"local__batch_size": 2, "rounds__cohort_size": 1}, SERIAL),
    "a GPU takes more": (64, {"local__batch_size": 8, "device": "cuda"}, ("batched", 32)),
    "and so does MPS": (64, {"local__batch_size": 8, "device": "mps"}, ("batched", 8)),
    "pooled data": (16, {"local__batch_size": 2, "method__name": "centralized", "method__head": "auto"}, SERIAL),
    "serial": (16, {"local__batch_size": 2, "runner": "serial"}, SERIAL),
    "batched where it does not pay": (500, {"local__batch_size": 8, "runner": "batched"}, ("batched", 2)),
    "a number": (500, {"local__batch_size": 8, "clients_per_batch": 6}, ("batched", 6)),
    "a number with its runner": (500, {"clients_per_batch": 6, "runner": "batched"}, ("batched", 6)),
    "a number above the cohort": (16, {"clients_per_batch": 6, "rounds__cohort_size": 4}, ("batched", 4)),
    "one": (16, {"local__batch_size": 2, "clients_per_batch": 1}, SERIAL),
    "one, with its runner": (16, {"local__batch_size": 2, "clients_per_batch": 1, "runner": "serial"}, SERIAL),
}


@pytest.mark.parametrize("case", AUTO)
def test_clients_per_batch(case: str, tiny: Prepared) -> None:
    length, keys, expected = AUTO[case]
    assert _stack(tiny, length, **keys) == expected
    again = dict(zip(("runner", "clients_per_batch"), expected, strict=True))
    assert _stack(tiny, 7 * length, **{**keys, **again}) == expected, (
        "a recorded number stays, whatever else it was from"
    )


def test_the_runner_is_the_one_that_is_recorded() -> None:
    prepared = _prepare(clients_per_batch=2)
    assert isinstance(prepared.federation.runner, BatchedRunner)
    assert (prepared.config.runner, prepared.federation.runner.clients_per_batch) == ("batched", 2)
    prepared = _prepare(runner="serial")
    assert isinstance(prepared.federation.runner, SerialRunner)
    assert (prepared.config.clients_per_batch, prepared.federation.runner.clients_per_batch) == (1, 1)


BEHIND = (
    ": adapters of lm_head cannot be stacked, because labelled tokens only get there; use runner: serial, or "
    "lora.target_modules without it"
)
REFUSED_STACKS: dict[str, tuple[dict[str, Any], str]] = {
    "serial, several": (
        {"runner": "serial", "clients_per_batch": 4},
        "clients_per_batch: 4 clients in one forward pass need runner: batched, got runner: serial",
    ),
    "batched, one": (
        {"runner": "batched", "clients_per_batch": 1},
        "clients_per_batch: 1 is what runner: serial does; give at least 2, auto, or that runner",
    ),
    "none": ({"clients_per_batch": 0}, "clients_per_batch: input should be greater than or equal to 1, got 0"),
    "too many": (
        {"clients_per_batch": 1025},
        "clients_per_batch: input should be less than or equal to 1024, got 1025",
    ),
    "another runner": ({"runner": "parallel"}, "runner: input should be 'auto', 'serial' or 'batched', got 'parallel'"),
    "output layer, batched": (
        {"runner": "batched", "lora__target_modules": ["q_proj", "lm_head"]},
        f"runner: batched{BEHIND}",
    ),
    "output layer, several": (
        {"clients_per_batch": 3, "lora__target_modules": ["lm_head"]},
        f"clients_per_batch: 3{BEHIND}",
    ),
}


@pytest.mark.parametrize("case", REFUSED_STACKS)
def test_what_cannot_be_stacked_is_refused(case: str) -> None:
    keys, message = REFUSED_STACKS[case]
    with pytest.raises(ConfigError) as caught:
        _prepare(**keys)
    assert message in str(caught.value)


def test_adapters_of_the_output_layer_are_trained_one_client_at_a_time() -> None:
    config = _prepare(lora__target_modules=["q_proj", "lm_head"]).config
    assert (config.runner, config.clients_per_batch) == SERIAL


def test_a_model_that_projects_position_embeddings_is_trained_one_client_at_a_time(tiny: Prepared) -> None:
    resident = adapt(tiny_deberta_classifier(), target_modules="default", rank=2, head_modules=("classifier",))
    base = replace(tiny.base, model=resident.model)
    paths = [target.path for target in resident.layout.targets]
    config = tiny.config.with_values({"runner": "auto", "clients_per_batch": "auto"})
    method = make_method("fedsa", "auto")

    def resolved(config: RunConfig) -> RunConfig:
        device = torch.device("cpu")
        return resolve(config, base, method, device, num_clients=3, median_length=9, targets=paths)

    assert (resolved(config).runner, resolved(config).clients_per_batch) == SERIAL
    for keys in ({"runner": "batched"}, {"clients_per_batch": 2}):
        with pytest.raises(ConfigError, match=r"query_proj cannot be stacked, because .*position embeddings.* serial"):
            resolved(config.with_values(keys))
