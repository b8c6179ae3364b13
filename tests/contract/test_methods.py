"""The contract that every method keeps (docs: methods), judged by a NumPy oracle on dense matrices.

One row of `ROWS` per method: a new method adds its row and the dense formula of what clients serve after its server
step. The delta weights that are compared come out of real adapted models (the layer applied to the identity), so a
transposed factor or a wrong scaling shows.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from contract.numpy_oracle import (
    Dense,
    Held,
    ideal,
    mean_of,
    served_fair,
    served_fedit,
    served_fedsa,
    served_ffa,
    served_flexlora,
    served_hetlora,
    served_local,
    served_rolora,
    weights_of,
)
from sfedlora.artifacts import Checkpoint, RunDirectory
from sfedlora.errors import UpdateError
from sfedlora.federation.state import FederationState
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.layer import LoraLinear
from sfedlora.methods import METHODS, Method, aggregate, make_method
from sfedlora.methods.base import Weighting
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Tensors, Update, factor_name, part_of, select_parts
from support.tiny_models import tiny_bert_classifier, tiny_gpt2, tiny_llama

RANK, SCALING, ROUND = 3, 1.7, 4
SIZES = LoraSizes(LoraSize(RANK, SCALING))
TOLERANCE = 3e-6  # of the largest entry: float32 means and products of rank 3
EXAMPLES = {"ann": 30, "bob": 7, "cyd": 101, "dan": 13, "eve": 59}
EVERYBODY, SOME = tuple(EXAMPLES), ("ann", "dan", "eve")


@dataclass(frozen=True)
class Row:
    """What the contract needs to know of a method.

    Attributes:
        served: the dense deltas that clients serve after the server step.
        exact: what `Method.exact` must say.
        clients: everybody in the federation.
        partial: the clients of a partial cohort.
        refactors: the server step keeps products, not factors: one client gets its own product back.
    """

    served: Callable[[Mapping[str, Held], Mapping[str, float], float], dict[str, Dense]]
    exact: str
    clients: tuple[str, ...] = EVERYBODY
    partial: tuple[str, ...] = SOME
    refactors: bool = False


ROWS = {
    "fedsa": Row(served_fedsa, "factor"),
    "fedit": Row(served_fedit, "no"),
    "ffa": Row(served_ffa, "model"),
    "rolora": Row(served_rolora, "model"),
    "flexlora": Row(served_flexlora, "truncated", refactors=True),
    "hetlora": Row(served_hetlora, "no"),
    "fair": Row(served_fair, "no"),
    "local": Row(served_local, "no"),
    "centralized": Row(served_local, "model", ("ann",), ("ann",)),
}
SENDING = [name for name in ROWS if name != "local"]
"""Methods whose updates hold tensors."""

LAYOUTS: dict[str, Callable[[], ResidentModel]] = {
    "linear": lambda: _adapted(tiny_llama(), "all-linear"),
    "conv1d": lambda: _adapted(tiny_gpt2(), ("c_attn", "mlp.c_proj")),
    "linear+head": lambda: _adapted(tiny_bert_classifier(), ("query", "value"), ("classifier",)),
}

PROGRESS = {"initial": None, "best_round": None, "best_loss": None}
NO_SFED = ("flexlora", "sfed")
"""The one pair of method and scaling rule that a configuration refuses."""

every_method = pytest.mark.parametrize("name", ROWS)
every_sender = pytest.mark.parametrize("name", SENDING)
every_weighting = pytest.mark.parametrize("weighting", ["examples", "uniform"])
pytestmark = pytest.mark.filterwarnings("ignore:rank 3 is above min:UserWarning")


@dataclass(frozen=True)
class Scene:
    """A server before a round, and what every client holds after local training (or has held since long).

    Attributes:
        state: the server's state.
        held: client id -> its complete adapter.
        cohort: who took part.
    """

    method: Method
    state: ServerState
    held: Mapping[str, Tensors]
    cohort: tuple[str, ...]

    def updates(self, examples: Mapping[str, int] = EXAMPLES) -> list[Update]:
        round_num = self.state.round_num + 1
        shared = self.method.shared_parts(round_num)
        return [
            Update(client, round_num, examples[client], select_parts(self.held[client], shared))
            for client in self.cohort
        ]

    def serving(self, state: ServerState, client: str) -> dict[str, Tensor]:
        """The shared factors and the client's own personal ones."""
        return {**state.shared, **select_parts(self.held[client], self.method.personal_parts())}


def _adapted(model: PreTrainedModel, targets: str | Sequence[str], head: Sequence[str] = ()) -> ResidentModel:
    return adapt(model, target_modules=targets, rank=RANK, head_modules=head)


@pytest.fixture(params=LAYOUTS, scope="module")
def resident(request: pytest.FixtureRequest) -> ResidentModel:
    return LAYOUTS[request.param]()


@pytest.fixture(scope="module")
def small() -> ResidentModel:
    """One layout, with a head, for tests that only look at tensors."""
    return LAYOUTS["linear+head"]()


def draw(resident: ResidentModel, seed: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    shapes = resident.layout.shapes(RANK)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_scene(
    name: str,
    resident: ResidentModel,
    *,
    partial: bool = False,
    dtype: torch.dtype = torch.float32,
    round_num: int = ROUND,
) -> Scene:
    method, row = make_method(name), ROWS[name]
    before = draw(resident, "server", dtype)
    trained = method.trained_parts(round_num)
    held = {
        client: {**before, **select_parts(draw(resident, f"{name}/{client}", dtype), trained)} for client in row.clients
    }
    shared = select_parts(before, frozenset(Part) - method.personal_parts())
    cohort = row.partial if partial else row.clients
    return Scene(method, ServerState(round_num - 1, shared, {}), held, cohort)


def measured_deltas(resident: ResidentModel, adapter: Tensors, scaling: float = SCALING) -> dict[str, Dense]:
    """Module path -> delta weight (out, in), as the adapted module itself applies it to the identity."""
    resident.load(adapter)
    resident.scaling = scaling
    deltas = {}
    for target in resident.layout.targets:
        layer = resident.model.get_submodule(target.path)
        assert isinstance(layer, LoraLinear)
        identity = torch.eye(target.in_features)
        with torch.no_grad():
            both, zero = layer(identity).double(), layer.base(identity).double()
        deltas[target.path] = (both - zero).T.numpy()
    return deltas


def held_pairs(scene: Scene, path: str) -> dict[str, Held]:
    a, b = factor_name(Part.A, path), factor_name(Part.B, path)
    return {client: Held(own[a].double().numpy(), own[b].double().numpy()) for client, own in scene.held.items()}


def close(actual: Dense, expected: Dense) -> bool:
    # The layer adds the delta to the base output in float32 before it is taken off again, hence the floor.
    return bool(np.abs(actual - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1.0))


def same_bits(left: Tensors, right: Tensors) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].contiguous().view(torch.uint8).equal(right[name].contiguous().view(torch.uint8))
        for name in left
    )


def copied(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(METHODS)


@every_method
def test_exactness_is_declared(name: str) -> None:
    assert make_method(name).traits.exact == ROWS[name].exact


@every_method
@every_weighting
@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
def test_clients_serve_what_the_dense_formula_says(
    name: str, weighting: Weighting, partial: bool, resident: ResidentModel
) -> None:
    scene = make_scene(name, resident, partial=partial)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting=weighting, sizes=SIZES)
    p = weights_of({client: EXAMPLES[client] for client in scene.cohort}, weighting)
    measured = {client: measured_deltas(resident, scene.serving(after, client)) for client in scene.held}
    for target in resident.layout.targets:
        pairs = held_pairs(scene, target.path)
        served = ROWS[name].served(pairs, p, SCALING)
        assert all(close(measured[client][target.path], served[client]) for client in scene.held)
        if scene.method.traits.exact == "model":
            assert close(measured["ann"][target.path], ideal(pairs, p, SCALING))


RULES = {"lora": 5.1 / RANK, "rslora": 5.1 / RANK**0.5, "sfed": 5.1 * (5 / RANK) ** 0.5}


@pytest.mark.parametrize(("name", "rule"), [pair for pair in itertools.product(ROWS, RULES) if pair != NO_SFED])
@pytest.mark.parametrize("round_num", [ROUND, ROUND + 1], ids=["even", "odd"])
def test_every_scaling_rule_in_even_and_odd_rounds(
    name: str, rule: str, round_num: int, resident: ResidentModel
) -> None:
    scene = make_scene(name, resident, round_num=round_num)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting="examples", sizes=SIZES)
    p = weights_of({client: EXAMPLES[client] for client in scene.cohort}, "examples")
    last = scene.cohort[-1]
    measured = measured_deltas(resident, scene.serving(after, last), RULES[rule])
    for path, delta in measured.items():
        assert close(delta, ROWS[name].served(held_pairs(scene, path), p, RULES[rule])[last])


def with_zero_b(scene: Scene, clients: Sequence[str]) -> Scene:
    def zeroed(own: Tensors) -> dict[str, Tensor]:
        return {name: torch.zeros_like(t) if part_of(name) is Part.B else t for name, t in own.items()}

    return replace(
        scene, held={client: zeroed(own) if client in clients else own for client, own in scene.held.items()}
    )


@pytest.mark.parametrize("name", ["fedit", "flexlora", "hetlora", "fair"])
@pytest.mark.parametrize("zero", [EVERYBODY, ("ann", "cyd")], ids=["all", "two"])
def test_zero_b_is_an_update_like_another(name: str, zero: tuple[str, ...], resident: ResidentModel) -> None:
    scene = with_zero_b(make_scene(name, resident), zero)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting="examples", sizes=SIZES)
    p = weights_of(EXAMPLES, "examples")
    measured = measured_deltas(resident, scene.serving(after, "ann"))
    for path, delta in measured.items():
        pairs = held_pairs(scene, path)
        expected = np.zeros_like(delta) if zero == EVERYBODY else ROWS[name].served(pairs, p, SCALING)["ann"]
        assert close(delta, expected)
        a = after.shared[factor_name(Part.A, path)].double().numpy()
        assert np.isfinite(a).all()
        if name != "flexlora" and zero == EVERYBODY:  # hetlora falls back to p
            assert close(a, mean_of({client: pair.a for client, pair in pairs.items()}, p))


def test_flexlora_gives_orthonormal_rows_and_the_error_of_the_dense_svd(small: ResidentModel) -> None:
    scene = make_scene("flexlora", small)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting="examples", sizes=SIZES)
    p = weights_of(EXAMPLES, "examples")
    for target in small.layout.targets:
        a, b = (after.shared[factor_name(part, target.path)].double().numpy() for part in (Part.A, Part.B))
        assert close(a @ a.T, np.eye(RANK))
        whole = ideal(held_pairs(scene, target.path), p, SCALING)
        lost = np.linalg.svd(whole)[1][RANK:]
        assert np.linalg.norm(whole - SCALING * b @ a) == pytest.approx(np.linalg.norm(lost), rel=1e-5)
        assert np.linalg.norm(lost) > 0.1 * np.linalg.norm(whole)  # the cut is a real one


def test_fair_comes_closer_to_the_mean_product_than_fedit(small: ResidentModel) -> None:
    scene = make_scene("fair", small)
    p = weights_of(EXAMPLES, "examples")
    for target in small.layout.targets:
        pairs = held_pairs(scene, target.path)
        whole = ideal(pairs, p, SCALING)
        near, far = (np.linalg.norm(served(pairs, p, SCALING)["ann"] - whole) for served in (served_fair, served_fedit))
        assert near < 0.99 * far


def test_the_inexact_method_is_told_from_the_exact_one(small: ResidentModel) -> None:
    scene = make_scene("fedit", small)
    pairs = held_pairs(scene, small.layout.targets[0].path)
    p = weights_of(EXAMPLES, "examples")
    assert not close(served_fedit(pairs, p, SCALING)["ann"], ideal(pairs, p, SCALING))


@every_method
@every_weighting
def test_a_shared_head_is_the_mean_and_a_personal_one_stays(
    name: str, weighting: Weighting, small: ResidentModel
) -> None:
    scene = make_scene(name, small, partial=True)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting=weighting, sizes=SIZES)
    p = weights_of({client: EXAMPLES[client] for client in scene.cohort}, weighting)
    personal = Part.HEAD in scene.method.personal_parts()
    assert personal == (name in {"fedsa", "local"})
    for path in small.layout.head:
        factor = factor_name(Part.HEAD, path)
        for client in scene.held:
            served = scene.serving(after, client)[factor]
            if personal:
                assert served.equal(scene.held[client][factor])
            else:
                heads = {sender: scene.held[sender][factor].double().numpy() for sender in p}
                assert close(served.double().numpy(), mean_of(heads, p))


@every_method
@every_weighting
def test_clients_that_did_not_change_leave_the_effective_weight(
    name: str, weighting: Weighting, resident: ResidentModel
) -> None:
    scene = make_scene(name, resident)
    unchanged = {client: {**own, **scene.state.shared} for client, own in scene.held.items()}
    scene = replace(scene, held=unchanged)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting=weighting, sizes=SIZES)
    for client in scene.held:
        before = measured_deltas(resident, scene.serving(scene.state, client))
        now = measured_deltas(resident, scene.serving(after, client))
        assert all(close(now[path], before[path]) for path in before)


@every_method
@every_weighting
def test_reply_order_changes_no_bit(name: str, weighting: Weighting, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    updates = scene.updates()
    expected = aggregate(scene.method, scene.state, updates, weighting=weighting, sizes=SIZES)
    for order in itertools.islice(itertools.permutations(updates), 1, None, 7):
        assert same_bits(
            aggregate(scene.method, scene.state, order, weighting=weighting, sizes=SIZES).shared, expected.shared
        )


def test_order_would_change_bits_if_updates_were_taken_as_they_come(small: ResidentModel) -> None:
    # The control of the test above: renaming the clients changes the order of summation, and with it some bit.
    scene = make_scene("fedsa", small)
    updates = scene.updates()
    renamed = [
        replace(update, client_id=other.client_id) for update, other in zip(updates, reversed(updates), strict=True)
    ]
    one = aggregate(scene.method, scene.state, updates, weighting="uniform", sizes=SIZES).shared
    two = aggregate(scene.method, scene.state, renamed, weighting="uniform", sizes=SIZES).shared
    assert not same_bits(one, two)


@every_method
@every_weighting
@pytest.mark.parametrize("factor", [3, 1000, 9973])
def test_scaling_all_example_counts_changes_no_bit(
    name: str, weighting: Weighting, factor: int, small: ResidentModel
) -> None:
    scene = make_scene(name, small)
    more = {client: factor * count for client, count in EXAMPLES.items()}
    one = aggregate(scene.method, scene.state, scene.updates(), weighting=weighting, sizes=SIZES)
    two = aggregate(scene.method, scene.state, scene.updates(more), weighting=weighting, sizes=SIZES)
    assert same_bits(one.shared, two.shared)


@every_sender
def test_example_counts_matter_only_when_they_weigh(name: str, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    other = {client: rank + 1 for rank, client in enumerate(EXAMPLES)}
    results = {
        weighting: [
            aggregate(scene.method, scene.state, scene.updates(counts), weighting=weighting, sizes=SIZES).shared
            for counts in (EXAMPLES, other)
        ]
        for weighting in ("examples", "uniform")
    }
    assert same_bits(*results["uniform"])
    assert same_bits(*results["examples"]) == (len(scene.cohort) == 1)


@every_method
@every_weighting
def test_one_client_gives_its_own_update(name: str, weighting: Weighting, small: ResidentModel) -> None:
    scene = replace(make_scene(name, small), cohort=("ann",))
    [update] = scene.updates()
    after = aggregate(scene.method, scene.state, [update], weighting=weighting, sizes=SIZES)
    if ROWS[name].refactors:
        own, served = measured_deltas(small, scene.held["ann"]), measured_deltas(small, scene.serving(after, "ann"))
        assert all(close(served[path], own[path]) for path in own)
        assert same_bits(select_parts(after.shared, [Part.HEAD]), select_parts(update.tensors, [Part.HEAD]))
    else:
        assert same_bits(select_parts(after.shared, scene.method.shared_parts(ROUND)), update.tensors)


@every_method
def test_what_was_not_sent_stays_bit_for_bit(name: str, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting="examples", sizes=SIZES)
    unsent = frozenset(Part) - scene.method.shared_parts(ROUND)
    assert same_bits(select_parts(after.shared, unsent), select_parts(scene.state.shared, unsent))


@every_method
@every_weighting
def test_inputs_are_not_mutated(name: str, weighting: Weighting, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    updates = scene.updates()
    before_updates = [copied(update.tensors) for update in updates]
    before_state = copied(scene.state.shared)
    after = aggregate(scene.method, scene.state, updates, weighting=weighting, sizes=SIZES)
    for name_of_factor in select_parts(after.shared, scene.method.shared_parts(ROUND)):
        after.shared[name_of_factor].fill_(7.0)  # the result is the server's own: writing to it reaches no input
    assert all(same_bits(update.tensors, old) for update, old in zip(updates, before_updates, strict=True))
    assert same_bits(scene.state.shared, before_state)
    assert scene.state.round_num == ROUND - 1


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_keys_and_shapes_are_kept(name: str, dtype: torch.dtype, small: ResidentModel) -> None:
    scene = make_scene(name, small, dtype=dtype)
    after = aggregate(scene.method, scene.state, scene.updates(), weighting="examples", sizes=SIZES)
    assert after.round_num == ROUND
    assert list(after.shared) == list(scene.state.shared)
    for factor, tensor in after.shared.items():
        assert (tensor.shape, tensor.dtype) == (scene.state.shared[factor].shape, dtype)
    assert after.extra == {}


@every_method
def test_the_state_survives_saving_and_loading_bit_for_bit(name: str, small: ResidentModel, tmp_path: Path) -> None:
    scene = make_scene(name, small)
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4e38, 1 / 3])
    for tensors in (scene.state.shared, *scene.held.values()):
        for tensor in tensors.values():
            tensor.view(-1)[:3] = odd[:3]
    after = aggregate(scene.method, scene.state, scene.updates(), weighting="examples", sizes=SIZES)
    personal = {client: select_parts(own, scene.method.personal_parts()) for client, own in scene.held.items()}
    directory = RunDirectory(tmp_path / "run")
    directory.save_checkpoint(
        Checkpoint(FederationState(after, personal, {}), PROGRESS), changed=scene.cohort, best_round=None
    )
    loaded = directory.load_checkpoint(ROUND).state
    assert loaded.server.round_num == ROUND
    assert _same_named_bits(loaded.server.shared, after.shared)
    assert _same_named_bits(loaded.server.extra, after.extra)
    assert loaded.personal.keys() == personal.keys()
    assert all(_same_named_bits(loaded.personal[client], personal[client]) for client in personal)
    following = replace(scene, state=after).updates()
    gone_on = aggregate(scene.method, loaded.server, following, weighting="examples", sizes=SIZES)
    uninterrupted = aggregate(scene.method, after, following, weighting="examples", sizes=SIZES)
    assert _same_named_bits(gone_on.shared, uninterrupted.shared)


def _same_named_bits(left: Tensors, right: Tensors) -> bool:
    """`same_bits`, whatever the order of the names (a safetensors file sorts them)."""
    return left.keys() == right.keys() and same_bits(left, {name: right[name] for name in left})


# Bad updates: each is made from a good one, raises UpdateError, and leaves the state as it was.

BAD = "cyd"


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
}
BAD_FACTS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "the round before": (lambda update: replace(update, round_num=ROUND - 1), "round 3"),
    "the round after": (lambda update: replace(update, round_num=ROUND + 1), "round 5"),
    "no examples": (lambda update: replace(update, num_examples=0), "0 training examples"),
    "negative examples": (lambda update: replace(update, num_examples=-5), "-5 training examples"),
}


def refused(scene: Scene, updates: Sequence[Update]) -> UpdateError:
    before = copied(scene.state.shared)
    with pytest.raises(UpdateError) as caught:
        aggregate(scene.method, scene.state, updates, weighting="examples", sizes=SIZES)
    assert same_bits(scene.state.shared, before)
    assert scene.state.round_num == ROUND - 1
    return caught.value


def spoiled(scene: Scene, spoil: Callable[[Update], Update]) -> tuple[str, list[Update]]:
    """The updates with one spoilt, and whose it is."""
    client = BAD if BAD in scene.cohort else scene.cohort[0]
    return client, [spoil(update) if update.client_id == client else update for update in scene.updates()]


@every_sender
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_bad_tensor_is_refused_by_client_and_name(name: str, what: str, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    spoil, words = BAD_TENSORS[what]
    client, updates = spoiled(scene, spoil)
    error = refused(scene, updates)
    factor = first_factor(scene.updates()[0])
    assert (error.client_id, error.tensor) == (client, factor)
    assert all(word in str(error) for word in (client, factor, words))


@every_method
@pytest.mark.parametrize("what", EXTRA)
def test_an_extra_tensor_is_refused_by_client_and_name(name: str, what: str, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    client, updates = spoiled(scene, lambda update: with_tensor(update, EXTRA[what], torch.zeros(RANK, 24)))
    error = refused(scene, updates)
    assert (error.client_id, error.tensor) == (client, EXTRA[what])
    assert client in str(error)
    assert "not asked for" in str(error)


@pytest.mark.parametrize("name", ["fedsa", "ffa", "local"])
def test_what_must_not_travel_is_refused(name: str, small: ResidentModel) -> None:
    # B of fedsa never leaves a client, A of ffa is frozen, nothing of local travels.
    scene = make_scene(name, small)
    kept = next(part for part in (Part.B, Part.A) if part not in scene.method.shared_parts(ROUND))
    factor = next(factor for factor in scene.held["ann"] if part_of(factor) is kept)
    _, updates = spoiled(scene, lambda update: with_tensor(update, factor, scene.held["ann"][factor]))
    assert refused(scene, updates).tensor == factor


@every_method
@pytest.mark.parametrize("what", BAD_FACTS)
def test_a_bad_fact_is_refused_by_client(name: str, what: str, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    spoil, words = BAD_FACTS[what]
    client, updates = spoiled(scene, spoil)
    error = refused(scene, updates)
    assert error.client_id == client
    assert client in str(error)
    assert words in str(error)


@every_method
def test_two_updates_of_one_client_are_refused(name: str, small: ResidentModel) -> None:
    scene = make_scene(name, small)
    error = refused(scene, [*scene.updates(), scene.updates()[0]])
    assert error.client_id == "ann"
    assert "second update" in str(error)


@every_method
def test_no_update_is_refused(name: str, small: ResidentModel) -> None:
    assert "no update" in str(refused(make_scene(name, small), []))
