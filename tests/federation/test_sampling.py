from __future__ import annotations

from collections import Counter

import pytest

from sfedlora.federation.sampling import sample_cohort, sample_evaluated

IDS = [f"client-{number:02d}" for number in range(12)]


@pytest.mark.parametrize("size", [None, 12, 50])
def test_everybody_in_client_id_order(size: int | None) -> None:
    assert sample_cohort(IDS[::-1], size, seed=0, round_num=1) == tuple(IDS)


def test_a_cohort_is_sorted_distinct_and_of_its_size() -> None:
    for round_num in range(1, 30):
        cohort = sample_cohort(IDS, 5, seed=0, round_num=round_num)
        assert len(set(cohort)) == 5
        assert list(cohort) == sorted(cohort)
        assert set(cohort) <= set(IDS)


def test_a_cohort_depends_on_seed_and_round_not_on_the_order_of_clients() -> None:
    one = sample_cohort(IDS, 5, seed=3, round_num=2)
    assert sample_cohort(IDS[::-1], 5, seed=3, round_num=2) == one
    rounds = {sample_cohort(IDS, 5, seed=3, round_num=round_num) for round_num in range(1, 11)}
    seeds = {sample_cohort(IDS, 5, seed=seed, round_num=2) for seed in range(10)}
    assert len(rounds) > 5
    assert len(seeds) > 5


def test_every_client_is_sampled_equally_often() -> None:
    counts = Counter(
        client for round_num in range(1, 1201) for client in sample_cohort(IDS, 3, seed=1, round_num=round_num)
    )
    # 1200 draws with probability 1/4: mean 300, standard deviation 15; 5 of them.
    assert all(abs(counts[client] - 300) < 75 for client in IDS)


def test_the_evaluated_sample_is_fixed_and_not_the_cohort() -> None:
    chosen = sample_evaluated(IDS, 4, seed=0)
    assert sample_evaluated(IDS[::-1], 4, seed=0) == chosen
    assert len(set(chosen)) == 4
    assert list(chosen) == sorted(chosen)
    assert sample_evaluated(IDS, 99, seed=0) == tuple(IDS)
    assert len({sample_evaluated(IDS, 4, seed=seed) for seed in range(10)}) > 5
