"""What every server step keeps, whatever the method: the clauses of the contract, and which methods drop one."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.numpy_oracle import Dense
from contract.scenes import (
    CASES,
    EVERYBODY,
    EXAMPLES,
    RANK,
    ROUND,
    Case,
    Scene,
    close,
    copied,
    make_scene,
    measured_deltas,
    same_bits,
    same_state,
    snapshot,
)
from sfedlora.artifacts import Checkpoint, Checkpoints, CheckpointWriter
from sfedlora.federation.state import FederationState
from sfedlora.lora.base_delta import select_deltas
from sfedlora.lora.inject import ResidentModel
from sfedlora.methods import make_method
from sfedlora.methods.base import Weighting
from sfedlora.types import Part, ServerState, Tensors, part_of, select_parts

PROGRESS = {"initial": None, "best_round": None, "best_loss": None}
DROP_UNCHANGED = {Case("hetlora", unequal=True), Case("flexlora", unequal=True)}
"""What a small client does not hold counts as zero in their means: with unequal ranks the model shrinks even where
nobody trained."""
SENDERS = [case for case in CASES if case.method != "local"]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_sender = pytest.mark.parametrize("case", SENDERS, ids=str)
every_weighting = pytest.mark.parametrize("weighting", ["examples", "uniform"])


def unchanged(scene: Scene) -> Scene:
    """The scene in which every client holds what it was given, beside the personal factors that it has."""
    return replace(
        scene, held={client: {**own, **scene.gives(scene.state, client)} for client, own in scene.held.items()}
    )


def keeps_weights(scene: Scene, after: ServerState, resident: ResidentModel) -> bool:
    """Whether every client serves the weights that it served before."""

    def served(state: ServerState, client: str) -> dict[str, Dense]:
        return measured_deltas(resident, scene.serving(state, client), scene.sizes.of(client), state)

    pairs = [(served(scene.state, client), served(after, client)) for client in scene.held]
    return all(close(now[path], before[path]) for before, now in pairs for path in before)


@every_case
@every_weighting
def test_clients_that_did_not_change_leave_the_effective_weight(
    case: Case, weighting: Weighting, resident: ResidentModel
) -> None:
    scene = unchanged(make_scene(case, resident))
    assert keeps_weights(scene, scene.step(weighting=weighting), resident) == (case not in DROP_UNCHANGED)


@pytest.mark.parametrize("case", sorted(DROP_UNCHANGED, key=str), ids=str)
def test_who_drops_that_clause_keeps_it_with_equal_ranks_and_says_so(case: Case, small: ResidentModel) -> None:
    scene = unchanged(make_scene(Case(case.method), small))
    assert keeps_weights(scene, scene.step(), small)
    module = type(make_method(case.method)).__module__
    documentation = sys.modules[module].__doc__ or ""
    assert "clients that did not change still change the result" in " ".join(documentation.split())


@every_case
@every_weighting
def test_reply_order_changes_no_bit(case: Case, weighting: Weighting, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    updates = scene.updates()
    expected = scene.step(updates, weighting=weighting)
    for order in itertools.islice(itertools.permutations(updates), 1, None, 7):
        assert same_state(scene.step(order, weighting=weighting), expected)


@pytest.mark.parametrize("name", ["fedsa", "fedit", "flora", "fedex", "flexlora", "hetlora"])
def test_order_would_change_bits_if_updates_were_taken_as_they_come(name: str, small: ResidentModel) -> None:
    # The control of the test above: renaming the clients changes the order of summation, and with it some bit.
    scene = make_scene(Case(name), small)
    updates = scene.updates()
    renamed = [
        replace(update, client_id=other.client_id) for update, other in zip(updates, reversed(updates), strict=True)
    ]
    assert not same_state(scene.step(updates, weighting="uniform"), scene.step(renamed, weighting="uniform"))


@every_case
@every_weighting
@pytest.mark.parametrize("factor", [3, 1000, 9973])
def test_scaling_all_example_counts_changes_no_bit(
    case: Case, weighting: Weighting, factor: int, small: ResidentModel
) -> None:
    scene = make_scene(case, small)
    more = {client: factor * count for client, count in EXAMPLES.items()}
    assert same_state(scene.step(weighting=weighting), scene.step(scene.updates(more), weighting=weighting))


@every_sender
def test_example_counts_matter_only_when_they_weigh(case: Case, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    other = {client: position + 1 for position, client in enumerate(EXAMPLES)}
    results = {
        weighting: [scene.step(scene.updates(counts), weighting=weighting) for counts in (EXAMPLES, other)]
        for weighting in ("examples", "uniform")
    }
    assert same_state(*results["uniform"])
    assert same_state(*results["examples"]) == (len(scene.cohort) == 1)


@pytest.mark.parametrize(
    ("case", "client"), [(case, client) for case in CASES for client in ("ann", "cyd") if client in case.row.clients]
)
@every_weighting
def test_one_client_gives_its_own_update(case: Case, client: str, weighting: Weighting, small: ResidentModel) -> None:
    scene = replace(make_scene(case, small), cohort=(client,))
    [update] = scene.updates()
    after = scene.step([update], weighting=weighting)
    size = scene.sizes.of(client)
    own = measured_deltas(small, scene.held[client], size, scene.state)
    served = measured_deltas(small, scene.serving(after, client), size, after)
    assert all(close(served[path], own[path]) for path in own)
    kept = [Part.HEAD] if case.row.refactors else scene.method.shared_parts(ROUND)
    assert same_bits(select_parts(scene.gives(after, client), kept), select_parts(update.tensors, kept))


@every_case
def test_what_was_not_sent_stays_bit_for_bit(case: Case, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    after = scene.step()
    unsent = frozenset(Part) - scene.method.shared_parts(ROUND)
    assert same_bits(select_parts(after.shared, unsent), select_parts(scene.state.shared, unsent))


@every_case
@every_weighting
def test_inputs_are_not_mutated(case: Case, weighting: Weighting, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    updates = scene.updates()
    before_updates = [copied(update.tensors) for update in updates]
    before_state = snapshot(scene.state)
    after = scene.step(updates, weighting=weighting)
    # The result is the server's own: writing to it reaches no input.
    averaged = frozenset({Part.B, Part.HEAD} if case.method == "flora" else Part) & scene.method.shared_parts(ROUND)
    for name in select_parts(after.shared, averaged):
        after.shared[name].fill_(7.0)
    for name, tensor in select_deltas(after.extra).items():
        if name.startswith("fresh"):
            tensor.fill_(7.0)
    assert all(same_bits(update.tensors, old) for update, old in zip(updates, before_updates, strict=True))
    assert same_state(scene.state, before_state)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_keys_and_shapes_are_kept(case: Case, dtype: torch.dtype, small: ResidentModel) -> None:
    scene = make_scene(case, small, dtype=dtype)
    after = scene.step()
    assert after.round_num == ROUND
    assert list(after.shared) == list(scene.state.shared)
    for factor, tensor in after.shared.items():
        assert (tensor.shape, tensor.dtype) == (scene.state.shared[factor].shape, dtype)
    assert select_deltas(after.extra).keys() == after.extra.keys()
    assert bool(after.extra) == (case.row.base_after is not None)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert {tensor.dtype for tensor in after.extra.values()} <= {wide}


@pytest.mark.parametrize("case", [case for case in CASES if case.row.base_after], ids=str)
def test_other_entries_of_the_state_stay(case: Case, small: ResidentModel) -> None:
    scene = make_scene(case, small)
    other = {"momentum/a:x": torch.ones(2), "delta_of_another_kind:x": torch.zeros(3)}
    scene = replace(scene, state=replace(scene.state, extra={**scene.state.extra, **other}))
    after = scene.step()
    assert all(after.extra[name] is tensor for name, tensor in other.items())
    assert after.extra.keys() - other.keys() == select_deltas(after.extra).keys()


@every_case
def test_the_state_survives_saving_and_loading_bit_for_bit(case: Case, small: ResidentModel, tmp_path: Path) -> None:
    scene = make_scene(case, small)
    odd = torch.tensor([0.0, -0.0, 1e-45])
    for tensors in (scene.state.shared, *scene.held.values()):
        for tensor in tensors.values():
            tensor.view(-1)[:3] = odd
    after = scene.step()
    personal = {client: select_parts(own, scene.method.personal_parts()) for client, own in scene.held.items()}
    checkpoint = Checkpoint(FederationState(after, personal, {}), PROGRESS)
    CheckpointWriter(Checkpoints(tmp_path)).save(checkpoint, changed=scene.cohort, best_round=None)
    loaded = Checkpoints(tmp_path).load(ROUND).state
    assert same_state(in_order_of(loaded.server, after), after)
    assert loaded.personal.keys() == personal.keys()
    assert all(same_bits(ordered(loaded.personal[client], personal[client]), personal[client]) for client in personal)
    following = replace(scene, state=after).updates()
    gone_on = replace(scene, state=loaded.server).step(following)
    uninterrupted = replace(scene, state=after).step(following)
    assert same_state(in_order_of(gone_on, uninterrupted), uninterrupted)


def in_order_of(state: ServerState, other: ServerState) -> ServerState:
    """The state with its names in the order of another (a safetensors file sorts them)."""
    return ServerState(state.round_num, ordered(state.shared, other.shared), ordered(state.extra, other.extra))


def ordered(tensors: Tensors, like: Tensors) -> dict[str, Tensor]:
    assert tensors.keys() == like.keys()
    return {name: tensors[name] for name in like}


def test_the_cases_have_clients_of_every_kind(small: ResidentModel) -> None:
    # Guards the suite itself: whole and partial cohorts, ranks of their own, a client alone at the largest rank.
    scene = make_scene(Case("fedsa", unequal=True), small)
    ranks = [tensors[name].shape[0] for tensors in scene.held.values() for name in list(tensors)[:1]]
    assert sorted(ranks) == [1, 2, RANK, 4, 5]
    assert scene.cohort == EVERYBODY
    assert {part_of(name) for name in scene.state.shared} == {Part.A}
