"""Cutting a stack into forward passes, against the cheapest of all ways to cut it."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.federation.launches import plan_launches

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)) | st.just((0, 0)), min_size=1, max_size=8)


def cost(shapes: list[tuple[int, int]], runs: list[tuple[int, int]], launch_tokens: int) -> int:
    total = 0
    for start, stop in runs:
        rows, tokens = (max(shape[axis] for shape in shapes[start:stop]) for axis in (0, 1))
        total += launch_tokens + (stop - start) * rows * tokens
    return total


def every_cut(number: int) -> list[list[tuple[int, int]]]:
    inner = range(1, number)
    cuts = [[0, *chosen, number] for count in range(number) for chosen in combinations(inner, count)]
    return [list(pairwise(cut)) for cut in cuts]


@settings(deadline=None)
@given(SHAPES, st.sampled_from([0, 10, 48, 1000]))
def test_no_other_cut_is_cheaper(shapes: list[tuple[int, int]], launch_tokens: int) -> None:
    runs = plan_launches(shapes, launch_tokens)
    covered = [place for start, stop in runs for place in range(start, stop)]
    assert covered == sorted(set(covered))
    assert all(place in covered for place, shape in enumerate(shapes) if shape[0])
    assert all(any(shapes[place][0] for place in range(start, stop)) for start, stop in runs)
    best = min(
        cost(shapes, [run for run in runs if any(shapes[place][0] for place in range(*run))], launch_tokens)
        for runs in every_cut(len(shapes))
    )
    assert cost(shapes, runs, launch_tokens) == best


@pytest.mark.parametrize("launch_tokens", [1, 48, 4096])
def test_like_shapes_share_one_pass(launch_tokens: int) -> None:
    assert plan_launches([(2, 16)] * 64, launch_tokens) == [(0, 64)]


def test_by_hand() -> None:
    shapes = [(2, 10), (2, 11), (2, 60), (2, 12), (2, 13)]
    assert plan_launches(shapes, 48) == [(0, 2), (2, 3), (3, 5)]  # one pass would compute 600 tokens, these 216 in 3
    assert plan_launches(shapes, 4096) == [(0, 5)]
    assert plan_launches([(0, 0), (2, 10), (0, 0)], 48) == [(1, 2)]
    assert plan_launches([(2, 10), (0, 0), (2, 10)], 48) == [(0, 3)]  # 20 tokens of nobody cost less than a pass
    assert plan_launches([(2, 10), (0, 0), (2, 10)], 8) == [(0, 1), (2, 3)]
    assert plan_launches([(0, 0)], 48) == []
