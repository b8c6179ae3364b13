"""What each method trains, shares and keeps; weights by hand; names and heads that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.methods import METHODS, Traits, client_weights, make_method
from sfedlora.setup.adapter import require_ranks
from sfedlora.types import AdapterLayout, Part, Target

A, B, HEAD = Part.A, Part.B, Part.HEAD

PARTS = [
    # method, head, trained, shared, personal
    ("fedsa", "auto", {A, B, HEAD}, {A}, {B, HEAD}),
    ("fedsa", "personal", {A, B, HEAD}, {A}, {B, HEAD}),
    ("fedsa", "shared", {A, B, HEAD}, {A, HEAD}, {B}),
    ("fedit", "auto", {A, B, HEAD}, {A, B, HEAD}, set()),
    ("fedit", "personal", {A, B, HEAD}, {A, B}, {HEAD}),
    ("ffa", "auto", {B, HEAD}, {B, HEAD}, set()),
    ("ffa", "personal", {B, HEAD}, {B}, {HEAD}),
    ("flexlora", "auto", {A, B, HEAD}, {A, B, HEAD}, set()),
    ("flexlora", "personal", {A, B, HEAD}, {A, B}, {HEAD}),
    ("fedex", "auto", {A, B, HEAD}, {A, B, HEAD}, set()),
    ("fedex", "personal", {A, B, HEAD}, {A, B}, {HEAD}),
    ("hetlora", "auto", {A, B, HEAD}, {A, B, HEAD}, set()),
    ("hetlora", "personal", {A, B, HEAD}, {A, B}, {HEAD}),
    ("fair", "auto", {A, B, HEAD}, {A, B, HEAD}, set()),
    ("fair", "personal", {A, B, HEAD}, {A, B}, {HEAD}),
    ("local", "auto", {A, B, HEAD}, set(), {A, B, HEAD}),
    ("local", "personal", {A, B, HEAD}, set(), {A, B, HEAD}),
    ("centralized", "auto", {A, B, HEAD}, {A, B, HEAD}, set()),
]


@pytest.mark.parametrize(("name", "head", "trained", "shared", "personal"), PARTS)
def test_parts(name: str, head: Any, trained: set[Part], shared: set[Part], personal: set[Part]) -> None:
    method = make_method(name, head)
    for round_num in (1, 2, 7):
        assert method.trained_parts(round_num) == trained
        assert method.shared_parts(round_num) == shared
        assert method.broadcast_parts(round_num, is_current=True) == shared
        assert method.broadcast_parts(round_num, is_current=False) == shared
    assert method.personal_parts() == personal


@pytest.mark.parametrize(("head", "also"), [("auto", {HEAD}), ("personal", set())])
def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones(head: Any, also: set[Part]) -> None:
    method = make_method("rolora", head)
    for round_num, trained, before in ((1, B, A), (2, A, B), (3, B, A), (8, A, B)):
        assert method.trained_parts(round_num) == {trained, HEAD}
        assert method.shared_parts(round_num) == {trained} | also
        assert method.broadcast_parts(round_num, is_current=True) == {before} | also
        assert method.broadcast_parts(round_num, is_current=False) == {A, B} | also
    assert method.personal_parts() == {HEAD} - also


@pytest.mark.parametrize(("head", "down", "kept"), [("auto", {HEAD}, set()), ("personal", set(), {HEAD})])
def test_flora_sends_everything_up_and_the_head_alone_down(head: Any, down: set[Part], kept: set[Part]) -> None:
    # Fresh adapters come from the run's seed; what the server learned travels as base deltas.
    method = make_method("flora", head)
    for round_num in (1, 2, 7):
        assert method.trained_parts(round_num) == {A, B, HEAD}
        assert method.shared_parts(round_num) == {A, B} | down
        assert method.broadcast_parts(round_num, is_current=True) == down
        assert method.broadcast_parts(round_num, is_current=False) == down
    assert method.personal_parts() == kept


TRAITS = {
    "fedsa": Traits(exact="factor", heterogeneous_ranks=True),
    "fedit": Traits(exact="no"),
    "ffa": Traits(exact="model"),
    "rolora": Traits(exact="model"),
    "flora": Traits(
        exact="model",
        is_mean=False,
        averages_a=False,
        heterogeneous_ranks=True,
        server_optimizers=False,
        restarts=True,
    ),
    "fedex": Traits(exact="model", is_mean=False, server_optimizers=False),
    "flexlora": Traits(
        exact="truncated",
        is_mean=False,
        heterogeneous_ranks=True,
        keeps_products=True,
        caps_rank=True,
        server_optimizers=False,
    ),
    "hetlora": Traits(exact="no", is_mean=False, heterogeneous_ranks=True),
    "fair": Traits(exact="no", is_mean=False),
    "local": Traits(exact="no", is_mean=False, averages_a=False, heterogeneous_ranks=True),
    "centralized": Traits(exact="model", averages_a=False, pools_data=True),
}


def test_traits() -> None:
    assert {name: make_method(name).traits for name in METHODS} == TRAITS


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_is_either_sent_or_kept(name: str) -> None:
    method = make_method(name)
    for round_num in (1, 2):
        shared, personal = method.shared_parts(round_num), method.personal_parts()
        assert method.trained_parts(round_num) <= shared | personal
        assert not shared & personal


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_own_name(name: str) -> None:
    assert make_method(name).name == name


def test_an_unknown_method_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'fedsaa'; did you mean 'fedsa'\? choose one of "):
        make_method("fedsaa")
    with pytest.raises(ConfigError, match=r"unknown method 'zzz'; choose one of fedsa, "):
        make_method("zzz")


@pytest.mark.parametrize(("name", "head"), [("local", "shared"), ("centralized", "personal")])
def test_a_head_that_the_method_contradicts_is_refused(name: str, head: Any) -> None:
    with pytest.raises(ConfigError, match=f"method.head: the head of method '{name}' is .*, got '{head}'"):
        make_method(name, head)


@pytest.mark.parametrize("name", METHODS)
def test_a_head_that_is_asked_for_is_the_one_that_is_made(name: str) -> None:
    for head in ("personal", "shared"):
        if (name, head) not in {("local", "shared"), ("centralized", "personal")}:
            assert (Part.HEAD in make_method(name, head).personal_parts()) == (head == "personal")


def test_weights_by_hand() -> None:
    counts = {"b": 30, "a": 10, "c": 60}
    assert client_weights(counts, "examples") == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    assert client_weights(counts, "uniform") == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert list(client_weights(counts, "examples")) == ["a", "b", "c"]
    assert client_weights({"z": 5}, "examples") == {"z": 1.0}


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_own_draws_are_refused_where_one_a_is_frozen_for_all(name: str) -> None:
    values = {
        "model": {"source": "m"},
        "data": {"source": "d"},
        "partition": {"num_clients": 4},
        "lora": {"init": "local"},
        "method": {"name": name},
    }
    with pytest.raises(ConfigError, match=rf"lora.init: local .* method '{name}' freezes one A"):
        RunConfig.from_mapping(values)


def flexlora(**sections: dict[str, Any]) -> RunConfig:
    least = {"model": {"source": "m"}, "data": {"source": "d"}, "partition": {"num_clients": 4}}
    return RunConfig.from_mapping({**least, "preset": "flexlora", **sections})


@pytest.mark.parametrize("count", ["effective", "total"])
def test_flexlora_refuses_a_scaling_that_counts_clients(count: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora.scaling: sfed with num_clients: {count} .* 'flexlora' .* use lora"):
        flexlora(lora={"scaling": "sfed", "num_clients": count})
    assert flexlora(lora={"scaling": "sfed", "num_clients": 1.0}).lora.num_clients == 1.0
    assert flexlora(lora={"scaling": "rslora", "num_clients": count}).lora.scaling == "rslora"


@pytest.mark.parametrize("name", ["flexlora", "flora", "fedex"])
def test_methods_without_a_step_to_take_refuse_a_server_optimizer(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rounds.server_optimizer: fedavgm .* '{name}' .* use none"):
        flexlora(rounds={"server_optimizer": "fedavgm"}, method={"name": name})
    assert flexlora(rounds={"proximal_mu": 0.1}).rounds.proximal_mu == 0.1


def test_flexlora_refuses_a_rank_that_no_svd_has() -> None:
    layout = AdapterLayout((Target("wide", 64, 32), Target("narrow", 64, 8)), {})
    require_ranks(layout.targets, 8, "flexlora")
    with pytest.raises(ConfigError, match=r"lora.rank: 9 is above min\(in_features, out_features\) = 8 of narrow"):
        require_ranks(layout.targets, 9, "flexlora")
