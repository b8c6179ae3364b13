"""What each method trains, shares and keeps; weights by hand; names and heads that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.methods import METHODS, client_weights, make_method
from sfedlora.types import Part

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
    assert method.personal_parts() == personal


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


def test_only_averaging_methods_let_the_number_of_clients_enter_the_scaling() -> None:
    assert {name for name in METHODS if make_method(name).averages_a} == {"fedsa", "fedit", "ffa"}
    assert {name for name in METHODS if make_method(name).pools_data} == {"centralized"}


def test_an_unknown_method_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ConfigError, match=r"method.name: unknown method 'fedsaa'; did you mean 'fedsa'\? choose one of "
    ):
        make_method("fedsaa")
    with pytest.raises(ConfigError, match=r"unknown method 'zzz'; choose one of fedsa, "):
        make_method("zzz")


@pytest.mark.parametrize(("name", "head"), [("local", "shared"), ("centralized", "personal")])
def test_a_head_that_the_method_contradicts_is_refused(name: str, head: Any) -> None:
    with pytest.raises(ConfigError, match=f"method.head: the head of method '{name}' is .*, got '{head}'"):
        make_method(name, head)


def test_weights_by_hand() -> None:
    counts = {"b": 30, "a": 10, "c": 60}
    assert client_weights(counts, "examples") == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    assert client_weights(counts, "uniform") == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert list(client_weights(counts, "examples")) == ["a", "b", "c"]
    assert client_weights({"z": 5}, "examples") == {"z": 1.0}


def test_own_draws_are_refused_where_one_a_is_frozen_for_all() -> None:
    values = {
        "model": {"source": "m"},
        "data": {"source": "d"},
        "partition": {"num_clients": 4},
        "lora": {"init": "local"},
        "method": {"name": "ffa"},
    }
    with pytest.raises(ConfigError, match=r"lora.init: local .* method 'ffa' freezes one A"):
        RunConfig.from_mapping(values)
