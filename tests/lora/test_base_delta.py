"""Base deltas against dense sums, the form they are kept in, what travels, and what a server step and a load create."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfedlora.lora.base_delta import (
    BaseDelta,
    adapter_with_deltas,
    advance_deltas,
    broadcast_deltas,
    select_deltas,
    total_deltas,
)
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.methods import aggregate, make_method
from sfedlora.types import AdapterLayout, LoraSize, LoraSizes, ServerState, Target, Update
from support.tiny_models import tiny_gpt2

SHAPES = {"wide": (6, 12), "tall": (12, 6), "square": (8, 8)}
"""Module -> (out, in)."""
BREAK_EVEN = {"wide": 4, "tall": 4, "square": 4}
"""6 * 12 / (6 + 12) and 8 * 8 / (8 + 8): from this rank on factors are no smaller than the matrix."""
Products = Mapping[str, tuple[Tensor, Tensor]]
Dense = NDArray[np.float64]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def products(rank: int, seed: int, dtype: torch.dtype = torch.float32, paths: Any = tuple(SHAPES)) -> Products:
    return {
        path: (
            draw(SHAPES[path][0], rank, seed=seed, dtype=dtype),
            draw(rank, SHAPES[path][1], seed=-seed, dtype=dtype),
        )
        for path in paths
    }


def dense(*rounds: Products) -> dict[str, Dense]:
    sums: dict[str, Dense] = {}
    for added in rounds:
        for path, (left, right) in added.items():
            product = left.double().numpy() @ right.double().numpy()
            sums[path] = sums.get(path, np.zeros_like(product)) + product
    return sums


def advanced(*rounds: Products) -> dict[str, Tensor]:
    extra: dict[str, Tensor] = {}
    for added in rounds:
        extra = advance_deltas(extra, added)
    return extra


def require_equal(total: Mapping[str, BaseDelta], expected: Mapping[str, Dense]) -> None:
    assert total.keys() == expected.keys()
    for path, delta in total.items():
        largest = np.abs(expected[path]).max()
        np.testing.assert_allclose(delta.matrix().double().numpy(), expected[path], rtol=0, atol=3e-6 * largest)


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].equal(right[name]) for name in left
    )


# Sums


def test_nothing_has_no_deltas() -> None:
    assert total_deltas({}) == {}
    assert advance_deltas({}, {}) == {}
    assert broadcast_deltas({}, is_current=False) == {}


def test_products_add_up() -> None:
    rounds = [products(rank, seed) for seed, rank in enumerate((1, 2, 1, 3, 1), start=1)]
    for count in range(1, len(rounds) + 1):
        require_equal(total_deltas(advanced(*rounds[:count])), dense(*rounds[:count]))


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.sampled_from(sorted(SHAPES)))), max_size=5))
def test_products_of_any_ranks_and_modules_add_up(plan: list[tuple[int, set[str]]]) -> None:
    rounds = [products(rank, seed, paths=sorted(paths)) for seed, (rank, paths) in enumerate(plan, start=1)]
    moved = [added for added, (rank, _) in zip(rounds, plan, strict=True) if rank > 0]
    require_equal(total_deltas(advanced(*rounds)), dense(*moved))


def test_a_product_of_rank_0_adds_nothing_and_keeps_what_there_is() -> None:
    one = advanced(products(2, 1))
    two = advance_deltas(one, products(0, 2))
    assert broadcast_deltas(two, is_current=True) == {}
    require_equal(total_deltas(two), dense(products(2, 1)))
    assert advance_deltas({}, products(0, 1)) == {}


def test_other_entries_stay_and_the_input_is_not_changed() -> None:
    before = {"momentum/a:wide": torch.ones(2), "delta": torch.ones(1), "fresh_other:wide": torch.ones(3)}
    kept = dict(before)
    after = advance_deltas(before, products(1, 1))
    assert before == kept
    assert all(after[name] is tensor for name, tensor in before.items())
    assert after.keys() - before.keys() == select_deltas(after).keys()
    assert sorted(select_deltas(after))[:2] == ["fresh_left:square", "fresh_left:tall"]
    assert select_deltas(before) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_dtype_of_the_products_is_kept(dtype: torch.dtype) -> None:
    extra = advanced(*(products(rank, rank, dtype) for rank in (1, 2, 4)))
    assert {tensor.dtype for tensor in extra.values()} == {dtype}
    kinds = {name.split(":")[0] for name in extra}
    assert kinds == {"delta_left", "delta_right", "delta2_left", "delta2_right", "fresh_full"}
    if dtype is torch.float64:
        sums = dense(*(products(rank, rank, dtype) for rank in (1, 2, 4)))
        for path, delta in total_deltas(extra).items():
            expected = sums[path]
            np.testing.assert_allclose(delta.matrix().numpy(), expected, rtol=0, atol=1e-13)


# The form


@pytest.mark.parametrize("path", SHAPES)
def test_a_product_becomes_a_matrix_exactly_where_factors_are_no_smaller(path: str) -> None:
    out_features, in_features = SHAPES[path]
    for rank in range(1, 7):
        [delta] = total_deltas(advanced(products(rank, 1, paths=[path]))).values()
        is_matrix = rank * (out_features + in_features) >= out_features * in_features
        assert is_matrix == (rank >= BREAK_EVEN[path])
        assert (delta.right is None) == is_matrix
        assert delta.rank == (min(out_features, in_features) if is_matrix else rank)
        numbers = delta.left.numel() + (0 if delta.right is None else delta.right.numel())
        assert numbers == min(rank * (out_features + in_features), out_features * in_features)


@pytest.mark.parametrize("path", SHAPES)
def test_a_sum_becomes_a_matrix_at_the_same_rank_and_stays_one(path: str) -> None:
    extra: dict[str, Tensor] = {}
    for count in range(1, 8):
        extra = advance_deltas(extra, products(1, count, paths=[path]))
        [delta] = total_deltas(extra).values()
        assert (delta.right is None) == (count >= BREAK_EVEN[path])
        kept, fresh = {f"delta_full:{path}"}, {f"fresh_left:{path}", f"fresh_right:{path}"}
        if count > BREAK_EVEN[path]:
            assert extra.keys() == kept | fresh
    no_round = advance_deltas(extra, {})
    assert no_round.keys() == {f"delta_full:{path}"}


def test_factors_are_concatenated_and_not_multiplied() -> None:
    one, two = products(1, 1), products(2, 2)
    for path, delta in total_deltas(advanced(one, two)).items():
        assert delta.right is not None
        assert delta.left.equal(torch.cat([one[path][0], two[path][0]], dim=1))
        assert delta.right.equal(torch.cat([one[path][1], two[path][1]]))


# What travels


@pytest.mark.parametrize("ranks", [(1, 1, 1, 1, 1, 1), (1, 2, 1, 4, 1, 5), (4, 1, 1), (1, 0, 2, 0, 0, 3)])
def test_a_client_that_adds_every_broadcast_to_what_it_has_ends_with_the_bits_of_the_server(
    ranks: tuple[int, ...],
) -> None:
    server: dict[str, Tensor] = {}
    client: dict[str, Tensor] = {}
    for seed, rank in enumerate(ranks, start=1):
        server = advance_deltas(server, products(rank, seed))
        client = advance_deltas(client, {}) | broadcast_deltas(server, is_current=True)
        assert same_bits(client, server)
        newcomer = broadcast_deltas(server, is_current=False)
        assert same_bits(newcomer, server)
        for path, delta in total_deltas(client).items():
            assert delta.matrix().equal(total_deltas(server)[path].matrix())


def test_a_current_client_is_sent_the_last_round_alone() -> None:
    first, last = products(1, 1), products(2, 2, paths=["wide"])
    extra = {"momentum/a:wide": torch.ones(2), **advanced(first, last)}
    sent = broadcast_deltas(extra, is_current=True)
    assert sent.keys() == {"fresh_left:wide", "fresh_right:wide"}
    assert sent["fresh_left:wide"].equal(last["wide"][0])
    assert sent["fresh_right:wide"].equal(last["wide"][1])
    assert broadcast_deltas(extra, is_current=False).keys() == extra.keys() - {"momentum/a:wide"}


def test_a_client_that_missed_a_round_needs_everything() -> None:
    server = advanced(products(1, 1), products(1, 2), products(1, 3))
    stale = advance_deltas(advanced(products(1, 1)), {})
    wrong = total_deltas(stale | broadcast_deltas(server, is_current=True))
    right = total_deltas(stale | broadcast_deltas(server, is_current=False))
    require_equal(right, dense(products(1, 1), products(1, 2), products(1, 3)))
    assert not np.allclose(wrong["wide"].matrix().numpy(), right["wide"].matrix().numpy())


# One adapter that does both

LAYOUT = AdapterLayout(tuple(Target(path, shape[1], shape[0]) for path, shape in SHAPES.items()), {"score": (3, 8)})


@pytest.mark.parametrize(
    ("ranks", "expected_rank"),
    [
        ({}, 2),
        ({"wide": 1, "tall": 3}, 2 + 3),  # mixed ranks, a module without a delta
        ({"wide": 4, "square": 1}, 2 + 6),  # a whole wide matrix
        ({"tall": 5, "wide": 2}, 2 + 6),  # a whole tall matrix
        ({"wide": 4, "tall": 4, "square": 4}, 2 + 8),
    ],
)
def test_one_adapter_of_gamma_1_does_what_adapter_and_deltas_do(ranks: dict[str, int], expected_rank: int) -> None:
    adapter = {name: draw(*shape, seed=len(name)) for name, shape in LAYOUT.shapes(2).items()}
    before = {name: tensor.clone() for name, tensor in adapter.items()}
    added = {path: products(rank, 7, paths=[path])[path] for path, rank in ranks.items()}
    deltas = total_deltas(advanced(added))
    joined, rank = adapter_with_deltas(adapter, deltas, LAYOUT, 1.7)
    assert rank == expected_rank
    assert {name: tuple(tensor.shape) for name, tensor in joined.items()} == LAYOUT.shapes(rank)
    assert joined["head:score"] is adapter["head:score"]
    for path, shape in SHAPES.items():
        expected = 1.7 * adapter[f"b:{path}"].double().numpy() @ adapter[f"a:{path}"].double().numpy()
        expected = expected + dense(added).get(path, np.zeros(shape))
        product = joined[f"b:{path}"].double().numpy() @ joined[f"a:{path}"].double().numpy()
        np.testing.assert_allclose(product, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert same_bits(adapter, before)


# What is created


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The size of the largest tensor that any operator made; views make none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and not func.is_view:
                self.largest = max(self.largest, value.numel())
        return result


OUT, IN = 72, 24  # GPT-2's c_attn; factors break even at rank 18


def resident_model() -> ResidentModel:
    return adapt(tiny_gpt2(), target_modules=r"transformer\.h\.0\.attn\.c_attn", rank=2)


def stepped(name: str, clients: int) -> tuple[ServerState, LargestTensor]:
    """The state after one round of clients of rank 2, and what the server step created."""
    resident = resident_model()
    shapes = resident.layout.shapes(2)
    sent = {
        f"c{number}": {name: draw(*shape, seed=100 * number + len(name)) for name, shape in shapes.items()}
        for number in range(clients)
    }
    state = ServerState(0, {name: torch.zeros(shape) for name, shape in shapes.items()}, {})
    updates = [Update(client, 1, 1, tensors) for client, tensors in sent.items()]
    with LargestTensor() as seen:
        after = aggregate(make_method(name), state, updates, weighting="uniform", sizes=LoraSizes(LoraSize(2, 1.0)))
    return after, seen


@pytest.mark.parametrize("name", ["fedex", "flora"])
@pytest.mark.parametrize(("clients", "is_matrix"), [(8, False), (9, True)])
def test_a_matrix_is_created_from_the_break_even_on_and_never_before(name: str, clients: int, is_matrix: bool) -> None:
    after, step = stepped(name, clients)
    resident = resident_model()
    adapter = {name: draw(*shape, seed=5) for name, shape in resident.layout.shapes(2).items()}
    layer = resident.model.get_submodule("transformer.h.0.attn.c_attn")
    x = draw(2, 3, IN, seed=6).requires_grad_()
    with LargestTensor() as load:
        resident.serve(adapter, size=LoraSize(2, 1.0), base_deltas=select_deltas(after.extra))
    with LargestTensor() as run:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    assert (step.largest >= OUT * IN) == is_matrix
    assert (load.largest >= OUT * IN) == is_matrix  # the base with the matrix in it
    assert min(step.largest, load.largest, run.largest) > 0
    assert run.largest < OUT * IN
    assert (after.extra.keys() == {"fresh_full:transformer.h.0.attn.c_attn"}) == is_matrix


def test_a_round_copies_no_earlier_piece() -> None:
    extra = advanced(products(1, 1), products(1, 2))
    after = advance_deltas(extra, products(1, 3))
    path = "wide"
    assert after[f"delta_left:{path}"] is extra[f"delta_left:{path}"]
    assert after[f"delta2_left:{path}"] is extra[f"fresh_left:{path}"]
    assert after[f"delta2_right:{path}"] is extra[f"fresh_right:{path}"]
    once_more = advance_deltas(after, {})
    assert once_more[f"delta3_left:{path}"] is after[f"fresh_left:{path}"]


def test_pieces_are_taken_in_the_order_of_their_rounds() -> None:
    extra: dict[str, Tensor] = {}
    for number in range(12):  # names sort delta10 before delta2
        piece = (torch.full((40, 1), 1.0), torch.full((1, 40), float(number)))
        extra = advance_deltas(extra, {"m": piece})
    right = total_deltas(extra)["m"].right
    assert right is not None
    assert right[:, 0].tolist() == [float(number) for number in range(12)]
    shuffled = {name: extra[name] for name in sorted(extra, reverse=True)}
    assert total_deltas(shuffled)["m"].left.equal(total_deltas(extra)["m"].left)
    again = total_deltas(shuffled)["m"].right
    assert again is not None
    assert again.equal(right)
