"""Bad updates: each is made from a good one, raises an error that names client and tensor, and changes no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.scenes import CASES, RANK, RANKS, ROUND, Case, Scene, make_scene, same_state, snapshot
from sfedlora.errors import UpdateError
from sfedlora.lora.inject import ResidentModel
from sfedlora.types import Part, Update, part_of, select_parts

BAD = "cyd"
SENDERS = [case for case in CASES if case.method != "local"]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_sender = pytest.mark.parametrize("case", SENDERS, ids=str)


def first_factor(update: Update) -> str:
    return next(iter(update.tensors))


def with_tensor(update: Update, name: str, tensor: Tensor) -> Update:
    return replace(update, tensors={**update.tensors, name: tensor})


def with_value(value: float) -> Callable[[Update], Update]:
    def spoil(update: Update) -> Update:
        tensor = update.tensors[first_factor(update)].clone()
        tensor[-1, -1] = value
        return with_tensor(update, first_factor(update), tensor)

    return spoil


def with_dtype(dtype: torch.dtype) -> Callable[[Update], Update]:
    return lambda update: with_tensor(update, first_factor(update), update.tensors[first_factor(update)].to(dtype))


BAD_TENSORS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "missing": (
        lambda update: replace(
            update, tensors={name: t for name, t in update.tensors.items() if name != first_factor(update)}
        ),
        "missing",
    ),
    "all missing": (lambda update: replace(update, tensors={}), "missing"),
    "transposed": (lambda u: with_tensor(u, first_factor(u), u.tensors[first_factor(u)].T.contiguous()), "shape"),
    "of another rank": (lambda u: with_tensor(u, first_factor(u), torch.zeros(RANK + 1, 24)), "shape"),
    "broadcastable": (lambda u: with_tensor(u, first_factor(u), torch.zeros(1)), "shape"),
    "empty": (lambda u: with_tensor(u, first_factor(u), torch.zeros(0, 24)), "shape"),
    "int32": (with_dtype(torch.int32), "dtype"),
    "bool": (with_dtype(torch.bool), "dtype"),
    "complex": (with_dtype(torch.complex64), "dtype"),
    "float64": (with_dtype(torch.float64), "dtype"),
    "float16": (with_dtype(torch.float16), "dtype"),
    "nan": (with_value(float("nan")), "NaN"),
    "inf": (with_value(float("inf")), "infinite"),
    "-inf": (with_value(float("-inf")), "infinite"),
}
EXTRA = {
    "of an unknown module": "a:no.such.module",
    "of no part": "weight",
    "with an empty name": "",
    "of a base delta": "fresh_left:bert.encoder.layer.0.attention.self.query",
}
BAD_FACTS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "the round before": (lambda update: replace(update, round_num=ROUND - 1), "round 3"),
    "the round after": (lambda update: replace(update, round_num=ROUND + 1), "round 5"),
    "no examples": (lambda update: replace(update, num_examples=0), "0 training examples"),
    "negative examples": (lambda update: replace(update, num_examples=-5), "-5 training examples"),
}


def refused(scene: Scene, updates: Sequence[Update]) -> UpdateError:
    before = snapshot(scene.state)
    with pytest.raises(UpdateError) as caught:
        scene.step(updates)
    assert same_state(scene.state, before)
    assert scene.state.round_num == ROUND - 1
    return caught.value


def spoiled(scene: Scene, spoil: Callable[[Update], Update]) -> tuple[str, list[Update]]:
    """The updates with one spoilt, and whose it is."""
    client = BAD if BAD in scene.cohort else scene.cohort[0]
    return client, [spoil(update) if update.client_id == client else update for update in scene.updates()]


@every_sender
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_bad_tensor_is_refused_by_client_and_name(case: Case, what: str, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    spoil, words = BAD_TENSORS[what]
    client, updates = spoiled(scene, spoil)
    error = refused(scene, updates)
    factor = first_factor(scene.updates()[0])
    assert (error.client_id, error.tensor) == (client, factor)
    assert all(word in str(error) for word in (client, factor, words))


@pytest.mark.parametrize("case", [case for case in SENDERS if case.unequal], ids=str)
@pytest.mark.parametrize("client", RANKS)
def test_a_tensor_of_another_clients_rank_is_refused_with_the_shape_of_its_own(
    case: Case, client: str, small: ResidentModel
) -> None:
    scene = make_scene(case, small)
    rank = RANKS[client]
    other = next(name for name in RANKS if RANKS[name] != rank)
    for part in scene.method.shared_parts(ROUND) & {Part.A, Part.B}:
        factor = next(iter(select_parts(scene.held[client], [part])))
        wrong = scene.held[other][factor]
        good = scene.updates()
        error = refused(scene, [with_tensor(u, factor, wrong) if u.client_id == client else u for u in good])
        assert (error.client_id, error.tensor) == (client, factor)
        shapes = {"given": (RANKS[other], 24), "own": (rank, 24)}
        given, own = (shape if part is Part.A else shape[::-1] for shape in shapes.values())
        assert f"has shape {given}; expected {own}" in str(error)


@every_case
@pytest.mark.parametrize("what", EXTRA)
def test_an_extra_tensor_is_refused_by_client_and_name(case: Case, what: str, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    client, updates = spoiled(scene, lambda update: with_tensor(update, EXTRA[what], torch.zeros(RANK, 24)))
    error = refused(scene, updates)
    assert (error.client_id, error.tensor) == (client, EXTRA[what])
    assert client in str(error)
    assert "not asked for" in str(error)


@pytest.mark.parametrize("name", ["fedsa", "ffa", "local"])
def test_what_must_not_travel_is_refused(name: str, small: ResidentModel) -> None:
    # B of fedsa never leaves a client, A of ffa is frozen, nothing of local travels.
    scene = make_scene(Case(name), small)
    kept = next(part for part in (Part.B, Part.A) if part not in scene.method.shared_parts(ROUND))
    factor = next(factor for factor in scene.held["ann"] if part_of(factor) is kept)
    _, updates = spoiled(scene, lambda update: with_tensor(update, factor, scene.held["ann"][factor]))
    assert refused(scene, updates).tensor == factor


@every_case
@pytest.mark.parametrize("what", BAD_FACTS)
def test_a_bad_fact_is_refused_by_client(case: Case, what: str, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    spoil, words = BAD_FACTS[what]
    client, updates = spoiled(scene, spoil)
    error = refused(scene, updates)
    assert error.client_id == client
    assert client in str(error)
    assert words in str(error)


@every_case
def test_two_updates_of_one_client_are_refused(case: Case, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    error = refused(scene, [*scene.updates(), scene.updates()[0]])
    assert error.client_id == "ann"
    assert "second update" in str(error)


@every_case
def test_no_update_is_refused(case: Case, small: ResidentModel) -> None:
    assert "no update" in str(refused(make_scene(case, small), []))
