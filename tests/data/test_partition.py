from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfedlora.data.partition import Scheme, assign_clients
from sfedlora.errors import ConfigError, DataError

RANDOM_SCHEMES: list[Scheme] = ["iid", "dirichlet", "shards", "quantity"]


def assign(
    scheme: Scheme,
    labels: list[Any] | NDArray[np.int64],
    num_clients: int | None,
    *,
    concentration: float | None = 1.0,
    min_examples: int = 3,
    seed: int = 0,
    groups: list[Any] | None = None,
) -> dict[str, NDArray[np.int64]]:
    return assign_clients(
        scheme=scheme,
        num_rows=len(labels),
        num_clients=num_clients,
        labels_or_column=labels,  # type: ignore[arg-type]
        concentration=concentration,
        min_examples=min_examples,
        seed=seed,
        groups=groups,
    )


def random_labels(count: int, num_labels: int) -> NDArray[np.int64]:
    return np.random.default_rng(count).integers(0, num_labels, count)


def sizes(clients: dict[str, NDArray[np.int64]]) -> list[int]:
    return [len(rows) for rows in clients.values()]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(RANDOM_SCHEMES), st.integers(60, 300), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_every_row_once_and_no_client_too_small(
    scheme: Scheme, count: int, num_clients: int, num_labels: int, seed: int
) -> None:
    labels = random_labels(count, num_labels)
    clients = assign(scheme, labels, num_clients, concentration=2.0, min_examples=4, seed=seed)
    assert list(clients) == [str(i) for i in range(num_clients)]
    assert sorted(np.concatenate(list(clients.values())).tolist()) == list(range(count))
    assert min(sizes(clients)) >= 4
    assert all(np.all(np.diff(rows) > 0) for rows in clients.values())
    again = assign(scheme, labels.tolist(), num_clients, concentration=2.0, min_examples=4, seed=seed)
    assert all(np.array_equal(clients[name], again[name]) for name in clients)


@pytest.mark.parametrize("scheme", RANDOM_SCHEMES)
def test_seeds_draw_otherwise(scheme: Scheme) -> None:
    draws = {tuple(assign(scheme, random_labels(200, 5), 4, seed=seed)["0"].tolist()) for seed in range(5)}
    assert len(draws) == 5


@given(st.integers(9, 400), st.integers(1, 20))
@settings(deadline=None)
def test_iid_sizes_differ_by_one_at_most(count: int, num_clients: int) -> None:
    if count < 3 * num_clients:
        return
    counts = sizes(assign("iid", [0] * count, num_clients))
    assert max(counts) - min(counts) <= 1


def test_iid_mixes_labels() -> None:
    labels = np.repeat([0, 1], 2000)
    for rows in assign("iid", labels, 4).values():
        assert abs(labels[rows].mean() - 0.5) < 0.07  # standard deviation 0.0137


def total_variation(labels: NDArray[np.int64], clients: dict[str, NDArray[np.int64]]) -> float:
    """Mean distance of the clients' label shares from the overall ones: 0 identical, near 1 disjoint."""
    overall = np.bincount(labels) / len(labels)
    shares = [np.bincount(labels[rows], minlength=len(overall)) / len(rows) for rows in clients.values()]
    return float(np.mean([np.abs(share - overall).sum() / 2 for share in shares]))


def test_dirichlet_is_more_uneven_at_a_smaller_concentration() -> None:
    labels = random_labels(6000, 10)
    distances = [
        np.mean([total_variation(labels, assign("dirichlet", labels, 10, concentration=c, seed=s)) for s in range(5)])
        for c in (0.1, 0.5, 5.0, 1000.0)
    ]
    assert all(more > less + 0.1 for more, less in pairwise(distances[:-1]))
    assert distances[-1] < 0.05


def test_dirichlet_proportions_have_the_law_they_claim() -> None:
    # One label over N = 4 clients: the share of client 0 is Beta(c, 3c), mean 1/4, variance 3 / (16 (4c + 1)).
    shares = [len(assign("dirichlet", [0] * 3000, 4, concentration=2.0, seed=s)["0"]) / 3000 for s in range(400)]
    assert abs(np.mean(shares) - 0.25) < 4 * math.sqrt(3 / 16 / 9 / 400)
    assert abs(np.var(shares) / (3 / 16 / 9) - 1) < 0.35


def test_shards_hold_two_label_runs() -> None:
    labels = random_labels(1000, 10)
    clients = assign("shards", labels, 20)
    assert set(sizes(clients)) == {50}
    ordered = np.sort(labels)
    most_in_a_shard = max(len(set(ordered[start : start + 25])) for start in range(0, 1000, 25))
    assert most_in_a_shard == 2
    assert max(len(set(labels[rows])) for rows in clients.values()) <= 4
    assert total_variation(labels, clients) > 0.7


def test_shards_of_a_client_are_drawn_at_random() -> None:
    labels = np.repeat(np.arange(6), 10)  # six shards, one per label
    owned = {
        frozenset(frozenset(labels[rows].tolist()) for rows in assign("shards", labels, 3, seed=seed).values())
        for seed in range(200)
    }
    assert len(owned) == 15  # every way to pair six shards


def test_quantity_is_uneven_in_size_and_not_in_labels() -> None:
    labels = random_labels(20_000, 2)
    clients = assign("quantity", labels, 10, concentration=1.0, min_examples=100)
    assert max(sizes(clients)) > 4 * min(sizes(clients))
    assert total_variation(labels, clients) < 0.05


def test_column_takes_every_value_as_a_client() -> None:
    values = ["b"] * 5 + ["a"] * 3 + ["tiny"] * 2 + ["c"] * 4
    clients = assign("column", values, None, concentration=None)
    assert {name: rows.tolist() for name, rows in clients.items()} == {
        "a": [5, 6, 7],
        "b": [0, 1, 2, 3, 4],
        "c": [10, 11, 12, 13],
    }
    assert list(clients) == ["a", "b", "c"]


def test_column_names_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    many = [f"small-{i:02d}" for i in range(30)]
    assign("column", ["a"] * 5 + ["b"] * 5 + ["tiny"] * 2 + many, None)
    assert "left out 31 column values (fewer than 3 examples): tiny (2), small-00 (1)" in caplog.text
    assert "and 11 more" in caplog.text


def test_column_keeps_the_largest() -> None:
    values = [10] * 5 + [9] * 3 + [-1] * 4 + [7] * 3
    assert list(assign("column", values, None)) == ["-1", "7", "9", "10"]
    assert list(assign("column", values, 3)) == ["-1", "7", "10"]  # 7 and 9 tie; by name


def test_column_rows_of_a_client_do_not_depend_on_others() -> None:
    values = ["a", "b", "c"] * 5
    some = assign("column", [value if value != "c" else "d" for value in values], None)
    assert np.array_equal(assign("column", values, None)["a"], some["a"])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RANDOM_SCHEMES), st.integers(0, 5), st.integers(1, 4))
def test_groups_stay_on_one_client(scheme: Scheme, seed: int, num_clients: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 60, 300).tolist()
    clients = assign(scheme, rng.integers(0, 3, 300), num_clients, concentration=5.0, seed=seed, groups=groups)
    owners = [{groups[row] for row in rows} for rows in clients.values()]
    assert sum(len(owner) for owner in owners) == len(set(groups))
    assert min(len(owner) for owner in owners) >= 3
    assert sorted(np.concatenate(list(clients.values())).tolist()) == list(range(300))


def test_label_of_a_group_is_its_most_frequent_one() -> None:
    groups = [row // 5 for row in range(400)]
    labels = [(row // 5) % 2 if row % 5 else 7 for row in range(400)]  # the first row of each group is odd one out
    clients = assign("shards", labels, 4, groups=groups)
    zeros = [len({groups[row] for row in rows if labels[row] == 0}) for rows in clients.values()]
    assert sizes(clients) == [100] * 4
    assert sum(zeros) == 40
    assert set(zeros) <= {0, 10, 20}  # 8 shards of 10 groups, each of one label


def test_column_decides_alone_where_groups_cross_it() -> None:
    speakers = ["ann", "bob"] * 6
    talks = [row // 4 for row in range(12)]
    clients = assign("column", speakers, None, groups=talks)
    assert {name: rows.tolist() for name, rows in clients.items()} == {
        "ann": [0, 2, 4, 6, 8, 10],
        "bob": [1, 3, 5, 7, 9, 11],
    }
    with pytest.raises(DataError, match="only 0 of 2 column values have at least 3 examples in at least 3 groups"):
        assign("column", speakers, None, groups=[row // 6 for row in range(12)])


@pytest.mark.parametrize(
    ("scheme", "labels", "num_clients", "message"),
    [
        ("iid", [0] * 20, 8, "20 examples are too few for 8 clients with at least 3 each .needs 24."),
        ("column", ["a"] * 9, None, "only 1 of 1 column values have at least 3 examples; expected at least 2 clients"),
        ("column", ["a", "b"] * 9, 3, "only 2 of 2 column values have at least 3 examples; expected 3 clients"),
        ("column", ["a", None] * 9, None, "the value in row 1 is None; expected text or integer"),
        ("column", ["a", 0.5] * 9, None, "the value in row 1 is 0.5"),
        ("shards", [True, False] * 9, 2, "the value in row 0 is True"),
    ],
)
def test_bad_data(scheme: Scheme, labels: list[Any], num_clients: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        assign(scheme, labels, num_clients)


def test_hopeless_draws_are_refused() -> None:
    message = "dirichlet': in 100 draws over 10 clients the smallest had [0-9]+ examples at best; expected 90"
    with pytest.raises(DataError, match=message):
        assign("dirichlet", random_labels(1000, 2), 10, concentration=0.1, min_examples=90)
    with pytest.raises(DataError, match="expected 3 in at least 3 groups"):
        assign("iid", [0] * 100, 2, groups=[row // 50 for row in range(100)])


def test_redrawing_finds_a_partition_that_is_large_enough() -> None:
    labels = random_labels(400, 2)
    first = [min(sizes(assign("dirichlet", labels, 5, concentration=0.5, seed=seed))) for seed in range(20)]
    assert min(first) < 20
    assert all(
        min(sizes(assign("dirichlet", labels, 5, concentration=0.5, min_examples=20, seed=seed))) >= 20
        for seed in range(20)
    )


def test_missing_labels() -> None:
    for scheme in ("dirichlet", "shards", "column"):
        with pytest.raises(DataError, match=f"{scheme}' needs class labels or a column"):
            assign_clients(scheme=scheme, num_rows=90, num_clients=2, concentration=1.0)
    with pytest.raises(DataError, match="2 groups for 90 rows; expected one group per row"):
        assign_clients(scheme="iid", num_rows=90, num_clients=2, groups=["a", "b"])
    with pytest.raises(DataError, match="3 labels for 90 rows"):
        assign_clients(scheme="shards", num_rows=90, num_clients=2, labels_or_column=[0, 1, 2])


@pytest.mark.parametrize(
    ("scheme", "num_clients", "concentration"),
    [("iid", None, None), ("iid", 0, None), ("dirichlet", 2, None), ("quantity", 2, 0.0), ("quantity", 2, math.nan),
     ("column", 1, None), ("other", 2, None)],
)  # fmt: skip
def test_bad_settings(scheme: Scheme, num_clients: int | None, concentration: float | None) -> None:
    with pytest.raises(ConfigError):
        assign(scheme, [0, 1] * 50, num_clients, concentration=concentration)
