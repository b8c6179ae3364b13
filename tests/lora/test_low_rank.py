"""Factored products against dense NumPy: any shape, any rank, zeros included."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.errors import AdapterError, ConfigError
from sfedlora.lora.low_rank import product_norm, truncated_svd

Dense = NDArray[np.float64]


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Left (out, s) and right (s, in) of any true rank from 0 on, at sizes from 1e-12 to 1e12, in float32."""
    num_out, size, num_in = (draw(st.integers(1, 9)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inner = draw(st.integers(0, size))
    scale = 10.0 ** draw(st.sampled_from([-12, 0, 12]))
    left = scale * rng.normal(size=(num_out, inner)) @ rng.normal(size=(inner, size))
    right = rng.normal(size=(size, num_in))
    if draw(st.booleans()):
        right[rng.integers(size)] = 0.0
    return torch.tensor(left, dtype=torch.float32), torch.tensor(right, dtype=torch.float32)


def dense(left: Tensor, right: Tensor) -> Dense:
    product: Dense = left.double().numpy() @ right.double().numpy()
    return product


@settings(deadline=None)
@given(factors(), st.data())
def test_the_cut_product_is_as_good_as_that_of_the_dense_svd(pair: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    left, right = pair
    rank = data.draw(st.integers(1, min(*left.shape, right.shape[1])))
    svd = truncated_svd(left, right, rank)
    assert (svd.u.shape, svd.singular.shape, svd.vt.shape) == ((len(left), rank), (rank,), (rank, right.shape[1]))
    u, singular, vt = (tensor.double().numpy() for tensor in (svd.u, svd.singular, svd.vt))
    whole = dense(left, right)
    expected = np.linalg.svd(whole)[1]
    size = float(np.linalg.norm(left.double().numpy()) * np.linalg.norm(right.double().numpy()))
    assert np.abs(singular - expected[:rank]).max() <= 3e-6 * size
    assert np.linalg.norm(u * singular @ vt - whole) <= np.linalg.norm(expected[rank:]) + 1e-5 * size
    assert np.abs(u.T @ u - np.eye(rank)).max() < 1e-5
    assert np.abs(vt @ vt.T - np.eye(rank)).max() < 1e-5
    assert (singular >= 0).all()
    assert (np.diff(singular) <= 0).all()
    assert all(row[np.abs(row).argmax()] > 0 for row in vt)


@settings(deadline=None)
@given(factors())
def test_the_norm_is_that_of_the_dense_product(pair: tuple[Tensor, Tensor]) -> None:
    left, right = pair
    size = float(np.linalg.norm(left.double().numpy()) * np.linalg.norm(right.double().numpy()))
    assert product_norm(left, right) == pytest.approx(np.linalg.norm(dense(left, right)), rel=1e-9, abs=1e-13 * size)


def test_by_hand() -> None:
    left, right = torch.tensor([[3.0, 0.0], [0.0, -2.0]]), torch.eye(2)
    svd = truncated_svd(left, right, 2)
    assert torch.allclose(svd.singular, torch.tensor([3.0, 2.0]))
    assert torch.allclose(svd.vt, torch.eye(2))
    assert torch.allclose(svd.u, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    assert product_norm(left, right) == pytest.approx(13**0.5)


def test_signs_do_not_follow_the_signs_of_the_factors() -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(7, 3, generator=generator), torch.randn(3, 9, generator=generator)
    one, two = truncated_svd(left, right, 3), truncated_svd(-left, -right, 3)
    assert torch.allclose(one.u, two.u, atol=1e-5)
    assert torch.allclose(one.vt, two.vt, atol=1e-5)


def test_a_product_that_cancels_has_norm_zero() -> None:
    left, right = torch.ones(40, 2), torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    assert product_norm(left, torch.cat([right, -right])) < 1e-12


@pytest.mark.parametrize(("given_dtype", "expected"), [("bfloat16", "float32"), ("float64", "float64")])
def test_dtypes(given_dtype: str, expected: str) -> None:
    left, right = (torch.ones(4, 3, dtype=getattr(torch, given_dtype)) for _ in range(2))
    svd = truncated_svd(left, right.T, 2)
    assert {tensor.dtype for tensor in (svd.u, svd.singular, svd.vt)} == {getattr(torch, expected)}
    assert float(svd.singular[0]) == pytest.approx(12.0)


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_the_product_cannot_have_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank {rank} of a product \(5, 3\) @ \(3, 8\); expected 1 to 3"):
        truncated_svd(torch.ones(5, 3), torch.ones(3, 8), rank)


@pytest.mark.parametrize("shapes", [((5, 3), (4, 8)), ((5,), (5, 2)), ((2, 5, 3), (3, 2))])
def test_factors_that_make_no_product_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    left, right = (torch.ones(shape) for shape in shapes)
    with pytest.raises(AdapterError, match="is no product"):
        truncated_svd(left, right, 1)
    with pytest.raises(AdapterError, match="is no product"):
        product_norm(left, right)


def test_no_matrix_of_the_products_shape_is_made() -> None:
    # (20000, 20000) in float32 would be 1.6 GB, its SVD minutes.
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(20_000, 12, generator=generator), torch.randn(12, 20_000, generator=generator)
    clock = time.perf_counter()
    svd = truncated_svd(left, right, 4)
    norm = product_norm(left, right)
    assert time.perf_counter() - clock < 20
    assert norm == pytest.approx(float(truncated_svd(left, right, 12).singular.double().norm()), rel=1e-5)
    residual = right @ svd.vt.T - torch.linalg.lstsq(left, svd.u * svd.singular).solution
    assert float(residual.abs().max()) < 1e-2 * float((right @ svd.vt.T).abs().max())
