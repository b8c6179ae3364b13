"""What clients serve after a server step, against dense NumPy, on Linear and Conv1D.

Every method with every scaling, weighting and cohort, with one rank and, where it can, with ranks of their own.
A new method adds its row to `scenes.ROWS` and its dense formula to `numpy_oracle`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from contract.numpy_oracle import Module, ideal, mean_of, mean_of_rows, served_fair, served_fedit
from contract.scenes import (
    ALPHA,
    CASES,
    EVERYBODY,
    EXAMPLES,
    LAYOUTS,
    RANK,
    RANKS,
    ROUND,
    ROWS,
    RULES,
    Case,
    Scene,
    close,
    draw,
    make_scene,
    measured_deltas,
    module_of,
    with_zero_b,
)
from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.lora.base_delta import total_deltas
from sfedlora.lora.inject import ResidentModel
from sfedlora.methods import METHODS, make_method
from sfedlora.methods.base import Weighting
from sfedlora.types import Part, ServerState, factor_name, select_parts

NO_SFED = ("flexlora", "sfed")
"""The one pair of method and scaling rule that a configuration refuses."""
MATRIX = [pair for pair in itertools.product(CASES, RULES) if (pair[0].method, pair[1]) != NO_SFED]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_weighting = pytest.mark.parametrize("weighting", ["examples", "uniform"])
full_and_partial = pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(METHODS)


@pytest.mark.parametrize("name", ROWS)
def test_traits_are_those_of_the_row(name: str) -> None:
    traits, row = make_method(name).traits, ROWS[name]
    assert (traits.exact, traits.heterogeneous_ranks) == (row.exact, row.unequal)


@pytest.mark.parametrize(("name", "rule", "rank"), list(itertools.product(ROWS, RULES, (RANK, tuple(RANKS.values())))))
def test_the_matrix_leaves_out_what_the_configuration_refuses(name: str, rule: str, rank: Any) -> None:
    values: dict[str, Any] = {
        "model": {"source": "m"},
        "data": {"source": "d"},
        "partition": {"num_clients": len(RANKS)},
        "method": {"name": name},
        "lora": {"scaling": rule, "rank": rank},
    }
    judged = {(case.method, rule, case.unequal) for case, rule in MATRIX}
    if (name, rule, rank != RANK) in judged:
        assert RunConfig.from_mapping(values).method.name == name
    else:
        with pytest.raises(ConfigError, match=r"lora\.(rank|scaling): "):
            RunConfig.from_mapping(values)


@pytest.mark.parametrize(("case", "rule"), MATRIX, ids=str)
@every_weighting
@full_and_partial
def test_clients_serve_what_the_dense_formula_says(
    case: Case, rule: str, weighting: Weighting, partial: bool, resident: ResidentModel
) -> None:
    scene = make_scene(case, resident, partial=partial, rule=rule)
    require_served(scene, scene.step(weighting=weighting), resident, weighting)


@every_weighting
@full_and_partial
def test_rolora_in_odd_rounds_too(weighting: Weighting, partial: bool, resident: ResidentModel) -> None:
    scene = make_scene(Case("rolora"), resident, partial=partial, round_num=ROUND + 1)
    require_served(scene, scene.step(weighting=weighting), resident, weighting)


def require_served(scene: Scene, after: ServerState, resident: ResidentModel, weighting: str) -> None:
    """Every client, in the cohort or not, serves what the oracle says."""
    modules = {target.path: module_of(scene, target.path, weighting) for target in resident.layout.targets}
    served = {path: scene.case.row.served(module) for path, module in modules.items()}
    for client in scene.held:
        measured = measured_deltas(resident, scene.serving(after, client), scene.sizes.of(client), after)
        assert all(close(measured[path], served[path][client]) for path in modules), client
        if scene.method.traits.exact == "model":
            whole = {path: module.base + ideal(module) for path, module in modules.items()}
            assert all(close(measured[path], whole[path]) for path in modules), client


def test_ranks_and_gammas_of_the_matrix_by_hand(small: ResidentModel) -> None:
    scene = make_scene(Case("fedsa", unequal=True), small, rule="sfed")
    assert {client: size.rank for client, size in scene.sizes.clients.items()} == RANKS
    assert scene.sizes.of("cyd").scaling == scene.sizes.server.scaling == pytest.approx(ALPHA)  # sqrt(5 / 5)
    assert scene.sizes.of("bob").scaling == pytest.approx(ALPHA * 5**0.5)
    equal = make_scene(Case("fedsa"), small).sizes
    assert equal.of("bob").rank == RANK
    assert equal.of("bob").scaling == pytest.approx(1.7)


# Base deltas


@pytest.mark.parametrize("case", [case for case in CASES if case.row.base_after], ids=str)
@every_weighting
def test_base_deltas_add_up_over_rounds(case: Case, weighting: Weighting, resident: ResidentModel) -> None:
    scene = make_scene(case, resident)
    scene = replace(scene, state=replace(scene.state, extra={}), base={path: 0 * d for path, d in scene.base.items()})
    for number, cohort in enumerate((("bob", "dan"), ("ann",), EVERYBODY, ("ann", "cyd", "eve")), start=1):
        held = {
            client: draw(resident, f"{case}/{client}/{number}", rank=scene.sizes.of(client).rank)
            for client in EVERYBODY
        }
        scene = replace(scene, cohort=cohort, held=held)
        after = scene.step(weighting=weighting)
        require_served(scene, after, resident, weighting)
        grown = {path: base_after(scene, path, weighting) for path in scene.base}
        total = total_deltas(after.extra)
        nothing = np.zeros(1)
        for path, dense in grown.items():
            assert close(total[path].matrix().double().numpy() if path in total else nothing, dense)
        scene = replace(scene, state=after, base=grown)


def base_after(scene: Scene, path: str, weighting: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    formula = scene.case.row.base_after
    assert formula is not None
    return formula(module_of(scene, path, weighting))


@pytest.mark.parametrize("name", ["fedex", "flora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scenes_end_with_base_deltas_as_factors_and_as_matrices(name: str, layout: str) -> None:
    # So that both ways of applying them, and the way from one to the other, are judged on Linear and on Conv1D.
    resident = LAYOUTS[layout]()
    forms = set()
    for partial in (False, True):
        scene = make_scene(Case(name), resident, partial=partial)
        before, after = total_deltas(scene.state.extra), total_deltas(scene.step().extra)
        forms |= {(before[path].right is None, after[path].right is None) for path in after}
    factors, grows, matrix = (False, False), (False, True), (True, True)
    assert forms >= {factors, grows} if layout != "linear+head" else {grows}
    assert matrix not in forms


def test_fedex_shares_the_means_and_puts_the_rest_into_the_base(resident: ResidentModel) -> None:
    scene = make_scene(Case("fedex"), resident)
    after = scene.step()
    zero = {name: 0 * tensor for name, tensor in scene.serving(after, "ann").items()}
    base = measured_deltas(resident, zero, scene.sizes.server, after)
    for path, measured in base.items():
        module = module_of(scene, path)
        a, b = (after.shared[factor_name(part, path)].double().numpy() for part in (Part.A, Part.B))
        assert close(a, mean_of({client: own.a for client, own in module.held.items()}, module.p))
        assert close(b, mean_of({client: own.b for client, own in module.held.items()}, module.p))
        assert close(measured, base_after(scene, path, "examples"))


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
def test_flora_leaves_zero_b_and_puts_everything_into_the_base(unequal: bool, resident: ResidentModel) -> None:
    scene = make_scene(Case("flora", unequal), resident)
    after = scene.step()
    assert all(not b.any() for b in select_parts(after.shared, [Part.B]).values())
    zero = {name: 0 * tensor for name, tensor in scene.serving(after, "ann").items()}
    for path, measured in measured_deltas(resident, zero, scene.sizes.of("ann"), after).items():
        assert close(measured, base_after(scene, path, "examples"))


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_the_stack_has_the_rank_that_the_paper_says(name: str) -> None:
    resident = LAYOUTS["conv1d"]()
    scene = make_scene(Case(name), resident, partial=True)
    after = scene.step()
    for target in resident.layout.targets:
        assert tuple(after.extra[f"fresh_left:{target.path}"].shape) == (target.out_features, 3 * RANK)
        assert tuple(after.extra[f"fresh_right:{target.path}"].shape) == (3 * RANK, target.in_features)


@pytest.mark.parametrize("agreed", [Part.A, Part.B, None], ids=["A", "B", "one client"])
def test_fedex_leaves_the_base_delta_as_it_is_where_clients_agree_on_a_factor(
    agreed: Part | None, small: ResidentModel
) -> None:
    scene = make_scene(Case("fedex"), small)
    if agreed is None:
        scene = replace(scene, cohort=("ann",))
    else:
        common = select_parts(scene.held["ann"], [agreed])
        scene = replace(scene, held={client: {**own, **common} for client, own in scene.held.items()})
    after = scene.step()
    assert not [name for name in after.extra if name.startswith("fresh")]
    before, now = total_deltas(scene.state.extra), total_deltas(after.extra)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[path].matrix(), now[path].matrix()) for path in before)
    require_served(scene, after, small, "examples")


# Ranks of their own


@every_weighting
@full_and_partial
def test_a_row_of_a_is_the_mean_over_those_that_have_it(
    weighting: Weighting, partial: bool, small: ResidentModel
) -> None:
    scene = make_scene(Case("fedsa", unequal=True), small, partial=partial)
    after = scene.step(weighting=weighting)
    for target in small.layout.targets:
        module = module_of(scene, target.path, weighting)
        a = after.shared[factor_name(Part.A, target.path)]
        expected = mean_of_rows({client: module.held[client].a for client in module.p}, module.p, module.a)
        assert close(a.double().numpy(), expected)
        before = scene.state.shared[factor_name(Part.A, target.path)]
        assert a[-1].equal(before[-1]) == partial  # nobody of the partial cohort has rank 5
        if not partial:
            assert a[-1].equal(scene.held["cyd"][factor_name(Part.A, target.path)][-1])


def test_the_rows_of_ranks_by_hand(small: ResidentModel) -> None:
    scene = make_scene(Case("fedsa", unequal=True), small, partial=True)  # ann 3, dan 2, eve 4; 30, 13, 59 examples
    name = next(iter(scene.state.shared))
    ann, dan, eve = (scene.held[client][name].double() for client in scene.cohort)
    a = scene.step().shared[name].double()
    torch.testing.assert_close(a[1], (30 * ann[1] + 13 * dan[1] + 59 * eve[1]) / 102, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a[2], (30 * ann[2] + 59 * eve[2]) / 89, rtol=1e-6, atol=1e-6)
    assert a[3].equal(eve[3])


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_rows_that_no_client_of_a_cohort_has_can_train_again(name: str, resident: ResidentModel) -> None:
    # Zeros in A and in B have a gradient of zero in both: such a rank would be lost for good.
    scene = replace(make_scene(Case(name, unequal=True), resident), cohort=("bob", "dan"))
    after = scene.step()
    require_served(scene, after, resident, "examples")
    reached = 2 if name == "hetlora" else 3  # the largest rank; the sum of the ranks
    for target in resident.layout.targets:
        a, b = (after.shared[factor_name(part, target.path)] for part in (Part.A, Part.B))
        assert not b[:, reached:].any()
        assert b[:, reached - 1].any()
        assert a[reached:].equal(scene.state.shared[factor_name(Part.A, target.path)][reached:])
        assert a[reached:].any(dim=1).all()


def test_flexlora_gives_each_rank_the_cut_in_its_own_gamma(small: ResidentModel) -> None:
    scene = make_scene(Case("flexlora", unequal=True), small)
    after = scene.step()
    for target in small.layout.targets:
        u, singular, vt = np.linalg.svd(ideal(module_of(scene, target.path)))
        for client, rank in RANKS.items():
            given = scene.gives(after, client)
            a, b = (given[factor_name(part, target.path)].double().numpy() for part in (Part.A, Part.B))
            assert a.shape[0] == b.shape[1] == rank
            assert close(scene.sizes.of(client).scaling * b @ a, (u[:, :rank] * singular[:rank]) @ vt[:rank])
            assert close(a @ a.T, np.eye(rank))


# Zero updates, and what single methods say of themselves


@pytest.mark.parametrize("case", [case for case in CASES if case.method not in {"ffa", "rolora"}], ids=str)
@pytest.mark.parametrize("zero", [EVERYBODY, ("ann", "cyd")], ids=["all", "two"])
def test_zero_b_is_an_update_like_another(case: Case, zero: Sequence[str], resident: ResidentModel) -> None:
    # After round 1 some B, or all of them, may still be zero.
    scene = with_zero_b(make_scene(case, resident), zero)
    after = scene.step()
    require_served(scene, after, resident, "examples")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*after.shared.values(), *after.extra.values()))


def test_hetlora_falls_back_to_the_weights_of_the_round_where_all_products_are_zero(small: ResidentModel) -> None:
    scene = with_zero_b(make_scene(Case("hetlora"), small), EVERYBODY)
    after = scene.step()
    for target in small.layout.targets:
        module = module_of(scene, target.path)
        a = after.shared[factor_name(Part.A, target.path)].double().numpy()
        assert close(a, mean_of({client: own.a for client, own in module.held.items()}, module.p))


def test_flexlora_gives_orthonormal_rows_and_the_error_of_the_dense_svd(small: ResidentModel) -> None:
    scene = make_scene(Case("flexlora"), small)
    after = scene.step()
    for target in small.layout.targets:
        a, b = (after.shared[factor_name(part, target.path)].double().numpy() for part in (Part.A, Part.B))
        assert close(a @ a.T, np.eye(RANK))
        whole = ideal(module_of(scene, target.path))
        lost = np.linalg.svd(whole)[1][RANK:]
        gap = np.linalg.norm(whole - scene.sizes.server.scaling * b @ a)
        assert gap == pytest.approx(np.linalg.norm(lost), rel=1e-5)
        assert np.linalg.norm(lost) > 0.1 * np.linalg.norm(whole)  # the cut is a real one


def one_module(case: Case, resident: ResidentModel) -> Module:
    return module_of(make_scene(case, resident), resident.layout.targets[0].path)


def test_fair_comes_closer_to_the_mean_product_than_fedit(small: ResidentModel) -> None:
    module = one_module(Case("fair"), small)
    near, far = (np.linalg.norm(served(module)["ann"] - ideal(module)) for served in (served_fair, served_fedit))
    assert near < 0.99 * far


def test_the_inexact_methods_are_told_from_the_exact_ones(small: ResidentModel) -> None:
    for case in (case for case in CASES if case.row.exact != "model" and case.method != "local"):
        module = one_module(case, small)
        assert not close(case.row.served(module)["ann"], ideal(module)), case


@every_case
@every_weighting
def test_a_shared_head_is_the_mean_and_a_personal_one_stays(
    case: Case, weighting: Weighting, small: ResidentModel
) -> None:
    scene = make_scene(case, small, partial=True)
    after = scene.step(weighting=weighting)
    personal = Part.HEAD in scene.method.personal_parts()
    assert personal == (case.method in {"fedsa", "local"})
    p = module_of(scene, small.layout.targets[0].path, weighting).p
    for path in small.layout.head:
        factor = factor_name(Part.HEAD, path)
        heads = {client: own[factor].double().numpy() for client, own in scene.held.items()}
        for client in scene.held:
            served = scene.serving(after, client)[factor]
            if personal:
                assert served.equal(scene.held[client][factor])
            else:
                assert close(served.double().numpy(), mean_of(heads, p))


def test_examples_of_the_scenes_weigh_differently() -> None:
    assert len(set(EXAMPLES.values())) == len(EXAMPLES)
