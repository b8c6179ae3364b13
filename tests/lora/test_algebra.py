"""The streaming mean against NumPy in float64, and its bitwise promises."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfedlora.errors import AdapterError, ConfigError
from sfedlora.lora.algebra import weighted_mean

NAMES = {"a:x": (2, 3), "b:x": (4, 2), "head:w": (5,)}


def draws(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in NAMES.items()} for _ in range(count)]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_equals_numpy(weights: list[float]) -> None:
    items = draws(len(weights))
    mean = weighted_mean(zip(weights, items, strict=True))
    for name in NAMES:
        expected = np.average([item[name].double().numpy() for item in items], axis=0, weights=weights)
        np.testing.assert_allclose(mean[name].numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_item_of_weight_one_is_that_item(dtype: torch.dtype) -> None:
    item = {"a:x": torch.tensor([1.1, -0.0, 3e-8, -7.5], dtype=dtype)}
    result = weighted_mean([(1.0, item)])["a:x"]
    assert result.dtype == dtype
    assert result.view(torch.uint8).equal(item["a:x"].view(torch.uint8))
    assert result.data_ptr() != item["a:x"].data_ptr()


def test_sums_bfloat16_in_float32() -> None:
    items = [(1.0, {"a:x": torch.tensor([value], dtype=torch.bfloat16)}) for value in [256.0] + [1.0] * 255]
    expected = torch.tensor([(256 + 255) / 256]).to(torch.bfloat16)
    assert weighted_mean(items)["a:x"].equal(expected)  # a bfloat16 sum would stay at 256


def test_same_order_gives_the_same_bits_and_the_weights_count() -> None:
    items = draws(5)
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    first = weighted_mean(zip(weights, items, strict=True))
    again = weighted_mean(zip(weights, items, strict=True))
    turned = weighted_mean(zip(weights[::-1], items, strict=True))
    assert all(first[name].equal(again[name]) for name in NAMES)
    assert not any(torch.allclose(first[name], turned[name], atol=1e-3) for name in NAMES)


def test_inputs_are_consumed_one_at_a_time_and_not_changed() -> None:
    items = draws(3)
    copies = [{name: tensor.clone() for name, tensor in item.items()} for item in items]

    def stream() -> Iterator[tuple[float, dict[str, Tensor]]]:
        for item in items:
            yield 2.0, item

    mean = weighted_mean(stream())
    for tensor in mean.values():
        tensor.add_(1)
    assert all(item[name].equal(copy[name]) for item, copy in zip(items, copies, strict=True) for name in NAMES)


def test_an_item_is_let_go_before_the_next_one_is_made() -> None:
    earlier: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[float, dict[str, Tensor]]]:
        for value in range(4):
            assert all(ref() is None for ref in earlier)
            tensor = torch.full((3,), float(value))
            earlier.append(weakref.ref(tensor))
            item = {"a:x": tensor}
            del tensor
            yield 1.0, item
            del item

    assert weighted_mean(stream())["a:x"].equal(torch.full((3,), 1.5))
    assert len(earlier) == 4


@pytest.mark.parametrize("count", [3, 7, 10, 49])
def test_equal_weights_that_add_up_to_one_give_what_equal_counts_give(count: int) -> None:
    items = [{"a:x": torch.full((1,), float(number), dtype=torch.float64)} for number in range(count)]
    shares = weighted_mean((1.0 / count, item) for item in items)["a:x"]
    assert float(shares) == pytest.approx((count - 1) / 2, rel=1e-14)


def test_a_mean_of_parameters_asks_for_no_gradient() -> None:
    items = [(1.0, {"a:x": torch.nn.Parameter(torch.ones(2))}) for _ in range(3)]
    mean = weighted_mean(items)["a:x"]
    assert not mean.requires_grad
    assert mean.equal(torch.ones(2))


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ConfigError, "sum to 0"),
        ([(0.0, {"a:x": torch.ones(1)})], ConfigError, "sum to 0"),
        ([(-1.0, {"a:x": torch.ones(1)})], ConfigError, "weight -1"),
        ([(math.nan, {"a:x": torch.ones(1)})], ConfigError, "weight nan"),
        ([(1.0, {"a:x": torch.ones(1, dtype=torch.int64)})], AdapterError, "a:x: dtype torch.int64"),
        ([(1.0, {"a:x": torch.ones(1)}), (1.0, {"a:y": torch.ones(1)})], AdapterError, "a:x, a:y"),
        ([(1.0, {}), (1.0, {"a:x": torch.ones(1)})], AdapterError, "a:x"),
        ([(1.0, {"a:x": torch.ones(1)}), (1.0, {"a:x": torch.ones(2)})], AdapterError, r"a:x: \(2,\)"),
        ([(1.0, {"a:x": torch.ones(1)}), (1.0, {"a:x": torch.ones(1).half()})], AdapterError, "float16"),
    ],
)
def test_items_that_do_not_fit_are_refused(
    items: list[tuple[float, dict[str, Tensor]]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        weighted_mean(items)
