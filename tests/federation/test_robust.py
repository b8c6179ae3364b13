"""Median, trimmed mean and Krum against NumPy on dense matrices, and what must hold for any updates."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfedlora.errors import RunError, UpdateError
from sfedlora.federation import robust
from sfedlora.federation.robust import RobustRule, krum, robust_mean, squared_distances
from sfedlora.federation.server_optimizer import ServerOptimizer
from sfedlora.federation.server_step import ServerRules, server_step, server_step_with_record
from sfedlora.methods import METHODS, make_method
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Tensors, Update, select_parts

Dense = NDArray[np.float64]

SHAPES = {"a:x": (3, 7), "b:x": (5, 3), "a:y": (3, 4), "b:y": (6, 3), "head:c": (2, 5)}
SIZES = LoraSizes(LoraSize(3, 1.7))
ONE_FACTOR = ("fedsa", "ffa", "rolora")


def drawn(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.tensor(scale * rng.normal(size=shape), dtype=torch.float32) for name, shape in SHAPES.items()}


def state_of(seed: int = 99) -> ServerState:
    return ServerState(2, drawn(seed), {})


def updates_of(method: str, count: int, *, spread: float = 0.1, seed: int = 0) -> list[Update]:
    """Round 3: the broadcast plus a change that all share plus one of their own."""
    shared = make_method(method).shared_parts(3)
    before, common = state_of().shared, drawn(seed + 1000, 0.3)
    updates = []
    for number in range(count):
        own = drawn(seed + number, spread)
        tensors = {name: before[name] + common[name] + own[name] for name in before}
        updates.append(Update(f"c{number:02d}", 3, 10 + number, select_parts(tensors, shared)))
    return updates


def step(method: str, rule: RobustRule | None, updates: Sequence[Update], state: ServerState | None = None) -> Tensors:
    rules = ServerRules(make_method(method), SIZES, "examples", robust=rule)
    return server_step(rules, state or state_of(), updates, {}).shared


def hostile(update: Update, strength: float) -> Update:
    before = state_of().shared
    return replace(
        update, tensors={name: before[name] + strength * (t - before[name]) for name, t in update.tensors.items()}
    )


@pytest.mark.parametrize("method", ONE_FACTOR)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_median_of_every_entry(method: str, count: int) -> None:
    updates = updates_of(method, count)
    after = step(method, RobustRule("median"), updates)
    for name, before in state_of().shared.items():
        if name not in updates[0].tensors:
            assert after[name].equal(before)
            continue
        values = np.stack([update.tensors[name].numpy() for update in updates])
        np.testing.assert_allclose(after[name].numpy(), np.median(values, axis=0), rtol=1e-6, atol=1e-7)
        assert after[name].dtype == torch.float32
    assert any(name in updates[0].tensors for name in after)


@pytest.mark.parametrize(("attackers", "count"), [(1, 3), (1, 6), (2, 5), (3, 10)])
def test_trimmed_mean_of_every_entry(attackers: int, count: int) -> None:
    updates = updates_of("fedsa", count)
    after = step("fedsa", RobustRule("trimmed_mean", attackers), updates)
    for name in ("a:x", "a:y"):
        values = np.sort(np.stack([update.tensors[name].numpy() for update in updates]).astype(float), axis=0)
        np.testing.assert_allclose(after[name].numpy(), values[attackers : count - attackers].mean(axis=0), atol=1e-6)


def test_large_factors_are_sorted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, rule = updates_of("fedsa", 5), RobustRule("trimmed_mean", 1)
    whole = step("fedsa", rule, updates)
    monkeypatch.setattr(robust, "BLOCK_VALUES", 40)
    assert all(tensor.equal(whole[name]) for name, tensor in step("fedsa", rule, updates).items())


def brute_force_distances(updates: Sequence[Update]) -> Dense:
    """By (out, in) matrices."""
    dense = []
    for update in updates:
        own = {name: tensor.double().numpy() for name, tensor in update.tensors.items()}
        parts = []
        for path in ("x", "y"):
            a, b = own.get(f"a:{path}"), own.get(f"b:{path}")
            if a is not None and b is not None:
                parts.append(1.7 * (b @ a))
            else:
                parts += [factor for factor in (a, b) if factor is not None]
        parts += [own[name] for name in own if name.startswith("head")]
        dense.append(np.concatenate([part.ravel() for part in parts]))
    return np.array([[np.sum((left - right) ** 2) for right in dense] for left in dense])


def brute_force_krum(updates: Sequence[Update], attackers: int) -> str:
    distances = brute_force_distances(updates)
    scores = []
    for row in range(len(updates)):
        others = sorted(distances[row, column] for column in range(len(updates)) if column != row)
        scores.append(sum(others[: len(updates) - attackers - 2]))
    return updates[int(np.argmin(scores))].client_id


@pytest.mark.parametrize("method", ["fedit", "fedsa", "ffa", "rolora", "fedex"])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_distances_are_those_of_dense_products(method: str, spread: float) -> None:
    updates = updates_of(method, 6, spread=spread)
    before = select_parts(state_of().shared, make_method(method).shared_parts(3))
    found, expected = squared_distances(before, updates, SIZES), brute_force_distances(updates)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10 * expected.max())


@pytest.mark.parametrize("method", ["fedit", "fedsa", "rolora", "flexlora", "flora"])
def test_krum_takes_the_update_that_brute_force_takes(method: str) -> None:
    seen = set()
    for seed in range(12):
        updates = updates_of(method, 7, seed=100 * seed)
        updates[seed % 7] = hostile(updates[seed % 7], -10.0)
        before = select_parts(state_of().shared, make_method(method).shared_parts(3))
        [taken] = krum(RobustRule("krum", 2), before, updates, SIZES)
        chosen = taken.client_id
        assert chosen == brute_force_krum(updates, 2)
        assert chosen != f"c{seed % 7:02d}"
        seen.add(chosen)
    assert len(seen) > 2


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"local", "centralized"}))
def test_krum_steps_as_if_the_chosen_client_were_alone(method: str) -> None:
    updates = updates_of(method, 7)
    rules = ServerRules(make_method(method), SIZES, "examples", robust=RobustRule("krum", 2))
    after, record = server_step_with_record(rules, state_of(), updates, {})
    [alone] = [update for update in updates if [update.client_id] == record["robust_selected"]]
    expected = server_step(replace(rules, robust=None), state_of(), [alone], {})
    assert after.round_num == expected.round_num == 3
    assert all(after.shared[name].equal(tensor) for name, tensor in expected.shared.items())
    assert after.extra.keys() == expected.extra.keys()


def test_of_two_as_near_the_first_by_client_id_is_taken() -> None:
    one = updates_of("fedsa", 1)[0]
    updates = [replace(one, client_id=client_id) for client_id in ("d", "b", "a", "c", "e")]
    [taken] = krum(RobustRule("krum", 1), select_parts(state_of().shared, [Part.A]), updates, SIZES)
    assert taken.client_id == "a"


def test_one_enormous_update_does_not_blur_the_distances_of_the_others() -> None:
    # Rounding at 1e30 is 1e14: distances from a mean that it shifts would all be equal.
    updates = updates_of("fedsa", 7)
    spoiled = [*updates[:6], hostile(updates[6], 1e30)]
    rule = RobustRule("krum", 2)
    before = select_parts(state_of().shared, [Part.A])
    [taken] = krum(rule, before, spoiled, SIZES)
    assert taken.client_id == brute_force_krum(spoiled, 2)


@pytest.mark.parametrize(("method", "num_taken"), [("fedit", 3), ("fedit", 8), ("fedsa", 5), ("fedex", 4)])
def test_several_are_taken_by_their_scores_into_the_methods_own_step(method: str, num_taken: int) -> None:
    updates = updates_of(method, 10)
    spoiled = [hostile(update, -10.0) if at in (4, 7) else update for at, update in enumerate(updates)]
    distances = brute_force_distances(spoiled)
    scores = [np.sort(np.delete(row, at))[:6].sum() for at, row in enumerate(distances)]
    expected = sorted(np.argsort(scores)[:num_taken].tolist())
    assert not {4, 7} & set(expected)
    rules = ServerRules(make_method(method), SIZES, "uniform", robust=RobustRule("krum", 2, num_taken))
    after, record = server_step_with_record(rules, state_of(), spoiled, {})
    assert record["robust_selected"] == [f"c{at:02d}" for at in expected]
    plain = server_step(replace(rules, robust=None), state_of(), [spoiled[at] for at in expected], {})
    assert all(after.shared[name].equal(tensor) for name, tensor in plain.shared.items())


def test_hostile_updates_are_not_taken_to_make_up_the_number() -> None:
    before = select_parts(state_of().shared, [Part.A])
    assert len(krum(RobustRule("krum", 2, 8), before, updates_of("fedsa", 7), SIZES)) == 5


RULES = st.sampled_from([RobustRule("median"), RobustRule("trimmed_mean", 2), RobustRule("krum", 2)])


@settings(max_examples=30, deadline=None)
@given(rule=RULES, order=st.permutations(range(8)), method=st.sampled_from(ONE_FACTOR))
def test_the_order_of_arrival_changes_no_bit(rule: RobustRule, order: list[int], method: str) -> None:
    updates = updates_of(method, 8)
    sorted_result, other = step(method, rule, updates), step(method, rule, [updates[at] for at in order])
    assert all(tensor.equal(other[name]) for name, tensor in sorted_result.items())


@settings(max_examples=30, deadline=None)
@given(names=st.permutations(range(7)), rule=RULES)
def test_who_sends_what_changes_no_bit(names: list[int], rule: RobustRule) -> None:
    updates = updates_of("fedsa", 7)
    renamed = [replace(update, client_id=f"c{number:02d}") for update, number in zip(updates, names, strict=True)]
    first, second = step("fedsa", rule, updates), step("fedsa", rule, renamed)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=5, max_size=9),
    rule=st.sampled_from([RobustRule("median"), RobustRule("trimmed_mean", 2)]),
)
def test_the_result_lies_between_the_updates(values: list[float], rule: RobustRule) -> None:
    updates = [Update(str(at), 1, 1, {"a:x": torch.tensor([[value]])}) for at, value in enumerate(values)]
    result = float(robust_mean(rule, {"a:x": torch.zeros(1, 1)}, updates)["a:x"])
    ordered = sorted(values)
    kept = ordered[2:-2] if rule.name == "trimmed_mean" else ordered
    assert kept[0] <= result <= kept[-1] or np.isclose(result, kept[0], rtol=1e-6) or np.isclose(result, kept[-1])


@settings(max_examples=25, deadline=None)
@given(
    rule=RULES,
    strength=st.sampled_from([-1e30, -1e4, -10.0, 3.0, 1e6, 1e30]),
    who=st.sets(st.integers(0, 8), min_size=1, max_size=2),
    method=st.sampled_from(ONE_FACTOR),
)
def test_two_of_nine_cannot_leave_the_range_of_the_honest(
    rule: RobustRule, strength: float, who: set[int], method: str
) -> None:
    updates = updates_of(method, 9)
    spoiled = [hostile(update, strength) if at in who else update for at, update in enumerate(updates)]
    after = step(method, rule, spoiled)
    for name in updates[0].tensors:
        honest = np.stack([update.tensors[name].numpy() for at, update in enumerate(updates) if at not in who])
        slack = 1e-6 * np.abs(honest).max()
        assert (after[name].numpy() >= honest.min(axis=0) - slack).all()
        assert (after[name].numpy() <= honest.max(axis=0) + slack).all()


@pytest.mark.parametrize("rule", [RobustRule("median"), RobustRule("trimmed_mean", 2), RobustRule("krum", 2)])
def test_the_mean_is_steered_where_the_rule_is_not(rule: RobustRule) -> None:
    updates = updates_of("fedsa", 10)
    spoiled = [hostile(update, -10.0) if at < 2 else update for at, update in enumerate(updates)]
    before = state_of().shared["a:x"]
    honest = step("fedsa", None, updates)["a:x"] - before
    assert float(((step("fedsa", None, spoiled)["a:x"] - before) * honest).sum()) < 0
    moved = step("fedsa", rule, spoiled)["a:x"] - before
    assert float((moved * honest).sum() / honest.norm() / moved.norm()) > 0.85


@pytest.mark.parametrize(
    ("rule", "count", "needed"), [(RobustRule("trimmed_mean", 2), 4, 5), (RobustRule("krum", 2), 6, 7)]
)
def test_too_few_updates_end_the_round_with_the_number_needed(rule: RobustRule, count: int, needed: int) -> None:
    with pytest.raises(RunError, match=f"needs at least {needed} updates, {count} are left"):
        step("fedsa", rule, updates_of("fedsa", count))


@pytest.mark.parametrize("rule", [RobustRule("median"), RobustRule("krum", 1)])
def test_a_second_update_of_one_client_is_refused(rule: RobustRule) -> None:
    updates = updates_of("fedsa", 6)
    with pytest.raises(UpdateError, match="second update"):
        step("fedsa", rule, [*updates, updates[0]])


def test_a_server_optimizer_steps_along_what_the_rule_gives() -> None:
    updates, rule = updates_of("fedsa", 5), RobustRule("median")
    rules = ServerRules(
        make_method("fedsa"), SIZES, "examples", ServerOptimizer("fedavgm", 0.5, 0.0, 0.0, 1e-3), robust=rule
    )
    before, plain = state_of().shared, step("fedsa", rule, updates)
    after = server_step(rules, state_of(), updates, {}).shared
    torch.testing.assert_close(after["a:x"], before["a:x"] + 0.5 * (plain["a:x"] - before["a:x"]))


class Counted(Mapping[str, torch.Tensor]):
    """Tensors that are made when they are asked for; notes what was asked for and how many were alive at once."""

    def __init__(self, tensors: Tensors, asked: list[str], alive: list[int]) -> None:
        self._tensors, self._asked, self._alive = tensors, asked, alive

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name].clone()
        self._asked.append(name)
        self._alive.append((self._alive[-1] if self._alive else 0) + 1)
        weakref.finalize(tensor, lambda: self._alive.append(self._alive[-1] - 1))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@pytest.mark.parametrize("rule", [RobustRule("median"), RobustRule("trimmed_mean", 1), RobustRule("krum", 1)])
def test_updates_are_read_once_and_one_factor_after_the_other(rule: RobustRule) -> None:
    parts = ("a", "b") if rule.name == "krum" else ("a",)
    before = {f"{part}:{at}": torch.zeros(2, 2) for at in range(20) for part in parts}
    asked: list[str] = []
    alive: list[int] = []
    updates = [Update(str(at), 1, 1, Counted(before, asked, alive)) for at in range(5)]
    if rule.name == "krum":
        krum(rule, before, updates, LoraSizes(LoraSize(2, 1.0)))
    else:
        robust_mean(rule, before, updates)
    assert sorted(asked) == sorted(list(before) * 5)
    modules = [name.partition(":")[2] for name in asked]
    assert [module for module, _ in itertools.groupby(modules)] == list(dict.fromkeys(modules))
    assert max(alive) <= 5
    assert alive[-1] == 0
