from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.data.splits import split_client
from sfedlora.errors import ConfigError, DataError


@settings(deadline=None)
@given(st.sets(st.integers(0, 500), min_size=3, max_size=60), st.integers(0, 9), st.text(max_size=5))
def test_every_row_once_ascending_and_from_own_rows_only(rows: set[int], seed: int, client_id: str) -> None:
    split = split_client(sorted(rows), client_id=client_id, seed=seed)
    parts = [split.train, split.validation, split.test]
    assert sorted(sum(parts, ())) == sorted(rows)
    assert all(part == tuple(sorted(part)) and len(part) >= 1 for part in parts)
    assert all(type(row) is int for part in parts for row in part)
    assert split == split_client(np.array(sorted(rows, reverse=True)), client_id=client_id, seed=seed)


@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (3, (0.8, 0.1, 0.1), (1, 1, 1)),
        (10, (0.8, 0.1, 0.1), (8, 1, 1)),
        (25, (0.8, 0.1, 0.1), (19, 3, 3)),
        (100, (0.8, 0.1, 0.1), (80, 10, 10)),
        (7, (0.2, 0.4, 0.4), (1, 3, 3)),
        (4, (0.001, 0.001, 0.998), (1, 1, 2)),
        (4, (0.01, 0.495, 0.495), (1, 2, 1)),
    ],
)
def test_sizes(count: int, fractions: tuple[float, float, float], sizes: tuple[int, int, int]) -> None:
    split = split_client(range(count), fractions=fractions, client_id="0", seed=0)
    assert (len(split.train), len(split.validation), len(split.test)) == sizes


def test_other_ids_and_seeds_draw_otherwise() -> None:
    splits = {split_client(range(50), client_id=name, seed=seed) for name in ("a", "b") for seed in (0, 1)}
    assert len(splits) == 4


def test_every_row_is_tested_somewhere() -> None:
    tested = [row for seed in range(300) for row in split_client(range(20), client_id="c", seed=seed).test]
    # 600 draws of 20 rows, 30 expected each, standard deviation 5.2
    counts = np.bincount(tested, minlength=20)
    assert counts.min() > 8
    assert counts.max() < 60


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=3, max_size=60).filter(lambda groups: len(set(groups)) >= 3), st.integers(0, 5)
)
def test_groups_stay_together(groups: list[int], seed: int) -> None:
    rows = range(len(groups))
    split = split_client(rows, client_id="x", seed=seed, groups=groups)
    parts = [split.train, split.validation, split.test]
    assert sorted(sum(parts, ())) == list(rows)
    assert all(parts)
    owners = [{groups[row] for row in part} for part in parts]
    assert not owners[0] & owners[1]
    assert not owners[0] & owners[2]
    assert not owners[1] & owners[2]


def test_small_groups_meet_the_fractions() -> None:
    groups = [row // 2 for row in range(400)]
    split = split_client(range(400), client_id="x", seed=0, groups=groups)
    assert (len(split.train), len(split.validation), len(split.test)) == (320, 40, 40)


def test_refused() -> None:
    with pytest.raises(DataError, match=r"client 'ann' has 2 examples; expected at least 3"):
        split_client([4, 5], client_id="ann", seed=0)
    with pytest.raises(DataError, match="client 'ann' has 2 groups of examples"):
        split_client(range(4), client_id="ann", seed=0, groups=["a", "a", "b", "b"])
    with pytest.raises(DataError, match="the group of row 1 is missing"):
        split_client(range(4), client_id="ann", seed=0, groups=["a", None, "b", "b"])
    with pytest.raises(DataError, match=r"the group of row 0 is \['a'\], not text or an integer"):
        split_client(range(4), client_id="ann", seed=0, groups=[["a"], "b", "c", "d"])
    for fractions in ((0.5, 0.5, 0.0), (0.5, 0.4, 0.2), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ConfigError, match="expected three positive numbers that add up to 1"):
            split_client(range(9), fractions=fractions, client_id="ann", seed=0)
