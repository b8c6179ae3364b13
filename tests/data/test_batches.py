from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.data.batches import plan_eval_batches, plan_local_batches
from sfedlora.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def flat(plan: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [batch for step in plan for batch in step]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 12), st.integers(1, 3), st.integers(0, 5))
def test_local_steps(lengths: list[int], batch_size: int, local_steps: int, accumulation: int, seed: int) -> None:
    indices = np.arange(0, 2 * len(lengths), 2)
    all_lengths = np.repeat(np.array(lengths, dtype=np.int64), 2)
    plan = plan_local_batches(
        all_lengths,
        indices,
        batch_size=batch_size,
        local_steps=local_steps,
        local_epochs=None,
        accumulation=accumulation,
        seed=seed,
    )
    assert [len(step) for step in plan] == [accumulation] * local_steps
    size = min(batch_size, len(indices))
    for batch in flat(plan):
        assert len(batch) == size
        assert len(set(batch.tolist())) == size  # no example twice in a batch
    counts = Counter(np.concatenate(flat(plan)).tolist())
    assert set(counts) <= set(indices.tolist())
    drawn = size * local_steps * accumulation  # whole permutations, then a part of one more
    assert {counts[index] for index in indices.tolist()} <= {drawn // len(indices), -(-drawn // len(indices))}


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_local_epochs(lengths: list[int], batch_size: int, local_epochs: int, accumulation: int, seed: int) -> None:
    indices = np.arange(len(lengths))
    plan = plan_local_batches(
        np.array(lengths, dtype=np.int64),
        indices,
        batch_size=batch_size,
        local_steps=None,
        local_epochs=local_epochs,
        accumulation=accumulation,
        seed=seed,
    )
    size = min(batch_size, len(indices))
    per_epoch = -(-len(indices) // size)
    batches = flat(plan)
    assert len(batches) == per_epoch * local_epochs
    assert len(plan) == -(-per_epoch // accumulation) * local_epochs
    for epoch in range(local_epochs):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(part).tolist()) == indices.tolist()
        assert sum(len(batch) != size for batch in part) <= 1


def test_same_plan_whatever_the_order_of_indices() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 50)
    settings_ = {"batch_size": 4, "local_steps": 5, "local_epochs": None, "accumulation": 2}
    one = plan_local_batches(lengths, [5, 9, 2, 40, 17, 33], seed=3, **settings_)  # type: ignore[arg-type]
    two = plan_local_batches(lengths, [33, 2, 5, 17, 40, 9], seed=3, **settings_)  # type: ignore[arg-type]
    other = plan_local_batches(lengths, [33, 2, 5, 17, 40, 9], seed=4, **settings_)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in flat(one)] == [batch.tolist() for batch in flat(two)]
    assert [batch.tolist() for batch in flat(one)] != [batch.tolist() for batch in flat(other)]


def test_like_lengths_share_a_batch_and_batches_come_in_random_order() -> None:
    lengths = np.array([1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9], dtype=np.int64)
    orders = set()
    for seed in range(40):
        plan = plan_local_batches(
            lengths, range(12), batch_size=4, local_steps=3, local_epochs=None, accumulation=1, seed=seed
        )
        assert all(len(set(lengths[batch])) == 1 for batch in flat(plan))
        orders.add(tuple(int(lengths[batch[0]]) for batch in flat(plan)))
    assert len(orders) == 6


def test_epochs_are_in_random_order_too() -> None:
    lengths = np.array([1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9], dtype=np.int64)
    orders = set()
    for seed in range(40):
        plan = plan_local_batches(
            lengths, range(12), batch_size=4, local_steps=None, local_epochs=1, accumulation=1, seed=seed
        )
        orders.add(tuple(int(lengths[batch[0]]) for batch in flat(plan)))
    assert len(orders) == 6


def test_short_rounds_draw_from_a_wider_window() -> None:
    lengths = np.concatenate([np.full(72, 3), np.full(8, 50)])
    longs = set()
    for seed in range(60):
        ((batch,),) = plan_local_batches(
            lengths, range(80), batch_size=8, local_steps=1, local_epochs=None, accumulation=1, seed=seed
        )
        longs.add(int((lengths[batch] == 50).sum()))
    assert longs == {0, 8}  # a window of 8 examples would mix short and long ones


def test_further_copies_widen_few_batches() -> None:
    # 20 draws of 18 examples: all once, and two neighbours in length once more. Batches of one length each would
    # compute 4 * (1 + 2 + 3 + 4 + 5) tokens; the further copies widen at most one batch, by one.
    lengths = np.repeat(np.array([1, 2, 3, 4, 5], dtype=np.int64), [4, 4, 4, 4, 2])
    for seed in range(20):
        plan = plan_local_batches(
            lengths, range(18), batch_size=4, local_steps=5, local_epochs=None, accumulation=1, seed=seed
        )
        counts = Counter(np.concatenate(flat(plan)).tolist())
        first, second = (int(lengths[example]) for example, count in counts.items() if count == 2)
        assert abs(first - second) in {0, 1, 4}  # the shortest and the longest count as neighbours
        assert sum(len(batch) * int(lengths[batch].max()) for batch in flat(plan)) <= 4 * (1 + 2 + 3 + 4 + 5 + 1)


def test_every_example_has_its_turn_where_all_come_more_than_once() -> None:
    lengths = np.arange(1, 11)
    counts: Counter[int] = Counter()
    for seed in range(400):
        plan = plan_local_batches(
            lengths, range(10), batch_size=4, local_steps=3, local_epochs=None, accumulation=1, seed=seed
        )
        counts.update(np.concatenate(flat(plan)).tolist())
    # 400 copies each and 800 further ones: 80 expected, standard deviation 8
    assert min(counts[i] for i in range(10)) > 440
    assert max(counts.values()) < 520


def test_every_example_has_its_turn() -> None:
    lengths = np.arange(1, 41)
    counts: Counter[int] = Counter()
    for seed in range(200):
        plan = plan_local_batches(
            lengths, range(40), batch_size=4, local_steps=2, local_epochs=None, accumulation=1, seed=seed
        )
        counts.update(np.concatenate(flat(plan)).tolist())
    # 1,600 draws, 40 expected each, standard deviation 5.7
    assert min(counts[i] for i in range(40)) > 15
    assert max(counts.values()) < 65


def quantiles(lengths: np.ndarray, plan: list[list[np.ndarray]]) -> list[float]:
    """Where the batches of a plan stand among the client's lengths, from 0 (shortest) to 1."""
    ranks = lengths.argsort().argsort() / (len(lengths) - 1)
    return [float(ranks[batch].mean()) for batch in flat(plan)]


@pytest.mark.parametrize(("steps", "epochs"), [(3, None), (10, None), (25, None), (None, 1), (None, 2)])
def test_clients_with_one_order_seed_take_like_quantiles_together(steps: int | None, epochs: int | None) -> None:
    rng = np.random.default_rng(2)
    few, many = rng.integers(3, 20, 130), rng.integers(30, 250, 170)
    together, apart = [], []
    for round_num in range(20):
        plans = []
        for seed, order_seed, lengths in ((1, 7, few), (2, 7, many), (3, 8, many)):
            plan = plan_local_batches(
                lengths,
                range(len(lengths)),
                batch_size=4,
                local_steps=steps,
                local_epochs=epochs,
                accumulation=1,
                seed=100 * round_num + seed,
                order_seed=100 * round_num + order_seed,
            )
            plans.append(np.array(quantiles(lengths, plan)))
        number = min(map(len, plans))
        together.append(np.abs(plans[0][:number] - plans[1][:number]).mean())
        apart.append(np.abs(plans[0][:number] - plans[2][:number]).mean())
    assert np.mean(together) < 0.05
    assert np.mean(apart) > 0.25  # two random places in [0, 1] are 1/3 apart


@pytest.mark.parametrize(("number", "steps", "epochs"), [(100, 2, None), (37, 5, None), (30, 12, None), (23, None, 1)])
def test_every_example_and_every_place_is_equally_likely_under_an_order_seed(
    number: int, steps: int | None, epochs: int | None
) -> None:
    lengths = np.sort(np.random.default_rng(3).integers(2, 90, number))
    counts: Counter[int] = Counter()
    first: Counter[int] = Counter()
    num_rounds, drawn = 600, 0
    for round_num in range(num_rounds):
        batches = flat(
            plan_local_batches(
                lengths,
                range(number),
                batch_size=4,
                local_steps=steps,
                local_epochs=epochs,
                accumulation=1,
                seed=round_num,
                order_seed=5000 + round_num,
            )
        )
        drawn += sum(map(len, batches))
        counts.update(np.concatenate(batches).tolist())
        first.update(batches[0].tolist())
    expected = drawn / number
    assert all(abs(counts[i] - expected) < 5 * expected**0.5 for i in range(number))
    expected = sum(first.values()) / number
    assert all(abs(first[i] - expected) < 5 * expected**0.5 for i in range(number))


@pytest.mark.parametrize(
    ("steps", "epochs", "size"), [(None, None, 4), (1, 1, 4), (0, None, 4), (None, 0, 4), (1, None, 0), (-1, None, 4)]
)
def test_refused(steps: int | None, epochs: int | None, size: int) -> None:
    with pytest.raises(ConfigError):
        plan_local_batches(
            np.ones(4, dtype=np.int64),
            range(4),
            batch_size=size,
            local_steps=steps,
            local_epochs=epochs,
            accumulation=1,
            seed=0,
        )


def test_no_examples() -> None:
    with pytest.raises(DataError, match="without training examples"):
        plan_local_batches(
            np.ones(4, dtype=np.int64), [], batch_size=1, local_steps=1, local_epochs=None, accumulation=1, seed=0
        )


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 120))
def test_eval_batches(lengths: list[int], batch_size: int, max_tokens: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    batches = plan_eval_batches(array, range(len(lengths)), batch_size=batch_size, max_tokens=max_tokens)
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert np.all(np.diff(array[order]) >= 0)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        longest = array[batch].max()
        assert len(batch) == 1 or (len(batch) <= batch_size and len(batch) * longest <= max_tokens)
        if following is not None:  # no batch could have taken one more
            more = len(batch) + 1
            assert more > batch_size or more * array[following[0]] > max_tokens


def test_eval_counts_padding_against_the_limit() -> None:
    lengths = np.array([3, 3, 4], dtype=np.int64)
    sizes = {
        limit: [len(batch) for batch in plan_eval_batches(lengths, range(3), batch_size=9, max_tokens=limit)]
        for limit in (12, 11, 6, 5, 1)
    }
    assert sizes == {12: [3], 11: [2, 1], 6: [2, 1], 5: [1, 1, 1], 1: [1, 1, 1]}


def test_eval_of_nothing() -> None:
    assert plan_eval_batches(np.ones(3, dtype=np.int64), [], batch_size=2, max_tokens=10) == []
