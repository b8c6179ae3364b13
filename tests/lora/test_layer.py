"""The layer against the formula in NumPy (float64), stacks against separate calls, base deltas, the seeded masks."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfedlora.errors import AdapterError, ModelError
from sfedlora.lora.base_delta import BaseDelta
from sfedlora.lora.layer import (
    DropoutState,
    LoraLinear,
    SeededDropout,
    StackedHead,
    linear_features,
    seeded_dropout,
)

IN, OUT, RANK = 7, 5, 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    base = nn.Linear(IN, OUT, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(draw(OUT, IN, seed=10))
        base.bias.copy_(draw(OUT, seed=11))
    return base


def conv1d() -> Conv1D:
    base = Conv1D(OUT, IN).double()
    with torch.no_grad():
        base.weight.copy_(draw(OUT, IN, seed=10).T)
        base.bias.copy_(draw(OUT, seed=11))
    return base


@pytest.mark.parametrize("make_base", [linear, conv1d])
@pytest.mark.parametrize("batch", [(4,), (4, 6), (2, 3, 4)])
def test_forward_and_gradients_equal_the_dense_formula(make_base: type, batch: tuple[int, ...]) -> None:
    a, b, x, upstream = draw(RANK, IN), draw(OUT, RANK, seed=1), draw(*batch, IN, seed=2), draw(*batch, OUT, seed=3)
    layer = LoraLinear(make_base(), a.clone(), b.clone(), scaling=0.83)
    inputs = x.clone().requires_grad_()
    output = layer(inputs)
    output.backward(upstream)

    weight, bias = draw(OUT, IN, seed=10).numpy(), draw(OUT, seed=11).numpy()
    merged = weight + 0.83 * b.numpy() @ a.numpy()
    rows, grads = x.numpy().reshape(-1, IN), upstream.numpy().reshape(-1, OUT)
    np.testing.assert_allclose(output.detach().numpy(), x.numpy() @ merged.T + bias, rtol=0, atol=1e-10)
    assert layer.a.grad is not None
    assert layer.b.grad is not None
    assert inputs.grad is not None
    np.testing.assert_allclose(layer.a.grad.numpy(), 0.83 * (grads @ b.numpy()).T @ rows, rtol=0, atol=1e-10)
    np.testing.assert_allclose(layer.b.grad.numpy(), 0.83 * grads.T @ (rows @ a.numpy().T), rtol=0, atol=1e-10)
    np.testing.assert_allclose(inputs.grad.numpy().reshape(-1, IN), grads @ merged, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scaling", [0.7, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)])
def test_a_stack_of_clients_equals_separate_calls(scaling: float | Tensor) -> None:
    a, b = draw(3, RANK, IN), draw(3, OUT, RANK, seed=1)
    x, upstream = draw(6, 4, IN, seed=2), draw(6, 4, OUT, seed=3)
    stack = LoraLinear(linear(), a.clone(), b.clone(), scaling=scaling)
    output = stack(x)
    output.backward(upstream)
    assert stack.a.grad is not None
    assert stack.b.grad is not None
    for client in range(3):
        gamma = scaling if isinstance(scaling, float) else float(scaling[client])
        alone = LoraLinear(linear(), a[client].clone(), b[client].clone(), scaling=gamma)
        rows = slice(2 * client, 2 * client + 2)
        own = alone(x[rows])
        own.backward(upstream[rows])
        torch.testing.assert_close(output[rows], own, rtol=0, atol=1e-12)
        torch.testing.assert_close(stack.a.grad[client], alone.a.grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(stack.b.grad[client], alone.b.grad, rtol=0, atol=1e-12)


def test_a_batch_that_does_not_divide_into_the_stack_is_refused() -> None:
    layer = LoraLinear(linear(), draw(3, RANK, IN), draw(3, OUT, RANK), path="here")
    with pytest.raises(AdapterError, match="here: a batch of 4 rows for a stack of 3"):
        layer(draw(4, IN))


def test_bfloat16_base_keeps_its_output_dtype_and_adapters_compute_in_float32() -> None:
    base = linear().to(torch.bfloat16)
    a, b, x = draw(RANK, IN).float(), draw(OUT, RANK, seed=1).float(), draw(4, IN, seed=2).to(torch.bfloat16)
    layer = LoraLinear(base, a, b, scaling=0.5)
    output = layer(x)
    assert output.dtype == torch.bfloat16
    exact = base(x).float() + 0.5 * (x.float() @ a.T) @ b.T
    assert output.equal(exact.to(torch.bfloat16))
    output.sum().backward()
    assert layer.a.grad is not None
    assert layer.a.grad.dtype == torch.float32


def test_the_base_is_frozen_and_stays_in_eval_mode() -> None:
    layer = LoraLinear(linear(), draw(RANK, IN), draw(OUT, RANK)).train()
    assert layer.training
    assert not layer.base.training
    assert not any(parameter.requires_grad for parameter in layer.base.parameters())
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert LoraLinear(nn.Linear(IN, OUT, bias=False), draw(RANK, IN), draw(OUT, RANK)).bias is None


# Base deltas

FORMS = ["factors", "matrix"]


def base_delta(form: str, dtype: torch.dtype = torch.float64) -> BaseDelta:
    """A correction of rank 2, as its factors or multiplied."""
    left, right = draw(OUT, 2, seed=20).to(dtype), draw(2, IN, seed=21).to(dtype)
    return BaseDelta(left, right) if form == "factors" else BaseDelta(left @ right, None)


def corrected() -> NDArray[np.float64]:
    """The base weight with the correction, and with an adapter of gamma 0.83."""
    delta = draw(OUT, 2, seed=20).numpy() @ draw(2, IN, seed=21).numpy()
    adapter = 0.83 * draw(OUT, RANK, seed=1).numpy() @ draw(RANK, IN).numpy()
    weight: NDArray[np.float64] = draw(OUT, IN, seed=10).numpy() + delta + adapter
    return weight


def pair_on(base: nn.Module, dtype: torch.dtype = torch.float64) -> LoraLinear:
    return LoraLinear(base, draw(RANK, IN).to(dtype), draw(OUT, RANK, seed=1).to(dtype), scaling=0.83, path="here")


@pytest.mark.parametrize("make_base", [linear, conv1d])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_a_base_delta_corrects_the_weight_and_gradients_flow_through_it(
    make_base: type, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    # float64 applies a matrix beside the base, float32 in its place; with and without gradients are ways of their own.
    layer = pair_on(make_base().to(dtype), dtype)
    layer.set_delta(base_delta(form, dtype))
    x, upstream = draw(2, 4, IN, seed=2), draw(2, 4, OUT, seed=3)
    inputs = x.clone().to(dtype).requires_grad_()
    output = layer(inputs)
    output.backward(upstream.to(dtype))
    rows, grads = x.numpy().reshape(-1, IN), upstream.numpy().reshape(-1, OUT)
    expected = x.numpy() @ corrected().T + draw(OUT, seed=11).numpy()
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        np.testing.assert_allclose(layer(inputs).numpy(), expected, rtol=0, atol=tolerance)
    assert output.dtype == dtype
    assert inputs.grad is not None
    assert layer.a.grad is not None
    assert layer.b.grad is not None
    np.testing.assert_allclose(inputs.grad.numpy().reshape(-1, IN), grads @ corrected(), rtol=0, atol=tolerance)
    b = draw(OUT, RANK, seed=1).numpy()
    np.testing.assert_allclose(layer.a.grad.numpy(), 0.83 * (grads @ b).T @ rows, rtol=0, atol=tolerance)


@pytest.mark.parametrize("make_base", [linear, conv1d])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taking_a_base_delta_back_restores_every_bit(make_base: type, form: str, dtype: torch.dtype) -> None:
    base = make_base().to(dtype)
    weight = base.weight.detach().clone()
    layer, x = pair_on(base, torch.float32), draw(4, IN, seed=2).to(dtype)
    before = layer(x)
    layer.set_delta(base_delta(form, torch.float32))
    with_delta = layer(x)
    assert not with_delta.equal(before)
    assert layer.weight is base.weight
    assert base.weight.equal(weight)
    layer.set_delta(base_delta(form, torch.float32))
    assert layer(x).equal(with_delta)  # the second delta takes the place of the first
    layer.set_delta(None)
    assert layer(x).equal(before)
    with torch.no_grad():
        assert layer(x).equal(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_base_is_corrected_in_float32(form: str) -> None:
    base = linear().to(torch.bfloat16)
    layer, x = pair_on(base, torch.float32), draw(4, IN, seed=2).to(torch.bfloat16)
    layer.set_delta(base_delta(form, torch.float32))
    output = layer(x)
    delta = base_delta("matrix", torch.float32).left
    exact = base(x).float() + x.float() @ delta.T + 0.83 * (x.float() @ layer.a.T) @ layer.b.T
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=2**-8, atol=1e-6)  # one rounding, at the end
    assert layer.weight.dtype == torch.bfloat16
    output.sum().backward()
    assert layer.a.grad is not None
    assert layer.a.grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_stack_shares_the_base_delta(form: str, dtype: torch.dtype) -> None:
    a, b, x = draw(3, RANK, IN).to(dtype), draw(3, OUT, RANK, seed=1).to(dtype), draw(6, 4, IN, seed=2).to(dtype)
    stack = LoraLinear(linear(dtype), a, b, scaling=0.83)
    stack.set_delta(base_delta(form, dtype))
    output = stack(x)
    for client in range(3):
        alone = LoraLinear(linear(dtype), a[client], b[client], scaling=0.83)
        alone.set_delta(base_delta(form, dtype))
        rows = slice(2 * client, 2 * client + 2)
        tolerance = 1e-12 if dtype is torch.float64 else 1e-5
        torch.testing.assert_close(output[rows], alone(x[rows]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_does_not_reach_the_base_delta(form: str) -> None:
    state = DropoutState(seeds=(11,))
    a, b, x = draw(RANK, IN), draw(OUT, RANK, seed=1), draw(4, 6, IN, seed=2)
    layer = LoraLinear(linear(), a, b, scaling=0.5, dropout=0.4, dropout_state=state, path="m")
    layer.set_delta(base_delta(form))
    masked = seeded_dropout(x, 0.4, (11,), "m")
    expected = linear()(x) + x @ base_delta("matrix").left.T + 0.5 * (masked @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


class DoubledLinear(nn.Linear):
    """A linear module whose forward is its own, as those of quantised weights are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_module_with_a_forward_of_its_own_is_called_and_corrected_beside(form: str) -> None:
    base = DoubledLinear(IN, OUT)
    layer, x = pair_on(base, torch.float32), draw(4, IN, seed=2).float()
    before = layer(x)
    layer.set_delta(base_delta(form, torch.float32))
    delta = base_delta("matrix", torch.float32).left
    torch.testing.assert_close(layer(x), before + x @ delta.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("left", "right", "shown"),
    [
        ((OUT, 2), (2, IN + 1), f"({OUT}, {IN + 1})"),
        ((OUT + 1, 2), (2, IN), f"({OUT + 1}, {IN})"),
        ((IN, 2), (2, OUT), f"({IN}, {OUT})"),
        ((IN, OUT), None, f"({IN}, {OUT})"),
    ],
)
def test_a_base_delta_that_does_not_fit_is_refused(
    left: tuple[int, ...], right: tuple[int, ...] | None, shown: str
) -> None:
    layer = pair_on(linear())
    delta = BaseDelta(torch.zeros(left), None if right is None else torch.zeros(right))
    with pytest.raises(AdapterError, match=re.escape(f"here: a base delta {shown}; expected ({OUT}, {IN})")):
        layer.set_delta(delta)


# What is refused


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((RANK, IN + 1), (OUT, RANK)),
        ((RANK, IN), (OUT + 1, RANK)),
        ((RANK, IN), (OUT, RANK + 1)),
        ((2, RANK, IN), (OUT, RANK)),
        ((2, RANK, IN), (3, OUT, RANK)),
        ((0, IN), (OUT, 0)),
        ((IN,), (OUT,)),
    ],
)
def test_factors_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="expected"):
        LoraLinear(linear(), torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize(
    "module", [nn.Embedding(4, 3), nn.LayerNorm(4), nn.Conv1d(2, 2, 1), nn.ModuleList(), nn.ReLU()]
)
def test_modules_that_are_not_linear_are_refused(module: nn.Module) -> None:
    assert linear_features(module) is None
    with pytest.raises(ModelError, match=f"m is a {type(module).__name__}"):
        LoraLinear(module, torch.zeros(1, 4), torch.zeros(3, 1), path="m")


def test_features_of_linear_modules() -> None:
    assert linear_features(nn.Linear(IN, OUT)) == (IN, OUT)
    assert linear_features(Conv1D(OUT, IN)) == (IN, OUT)


def test_dropout_masks_the_lora_input_only() -> None:
    state = DropoutState()
    a, b, x = draw(RANK, IN), draw(OUT, RANK, seed=1), draw(4, 6, IN, seed=2)
    layer = LoraLinear(linear(), a, b, scaling=0.5, dropout=0.4, dropout_state=state, path="m")
    undropped = layer(x)
    assert undropped.equal(LoraLinear(linear(), a, b, scaling=0.5)(x))
    state.seeds = (11,)
    masked = seeded_dropout(x, 0.4, (11,), "m")
    expected = linear()(x) + 0.5 * (masked @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(undropped, expected)
    state.seeds = None
    assert layer(x).equal(undropped)


def test_masks_depend_on_seed_and_address_and_nothing_else() -> None:
    x = torch.ones(4, 50, 20)
    mask = seeded_dropout(x, 0.25, (5,), "m")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert mask.equal(seeded_dropout(x, 0.25, (5,), "m"))
    assert torch.get_rng_state().equal(before)
    assert not mask.equal(seeded_dropout(x, 0.25, (6,), "m"))
    assert not mask.equal(seeded_dropout(x, 0.25, (5,), "n"))
    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_every_client_of_a_stack_draws_its_own_mask() -> None:
    x = draw(6, 4, IN)
    stacked = seeded_dropout(x, 0.5, (1, 2, 3), "m")
    for client, seed in enumerate((1, 2, 3)):
        rows = slice(2 * client, 2 * client + 2)
        assert stacked[rows].equal(seeded_dropout(x[rows], 0.5, (seed,), "m"))
    with pytest.raises(AdapterError, match="6 rows for 4 dropout seeds"):
        seeded_dropout(x, 0.5, (1, 2, 3, 4), "m")


def test_head_dropout_follows_the_state() -> None:
    state = DropoutState()
    dropout = SeededDropout(0.5, state, "dropout").train()
    x = draw(8, 10)
    assert dropout(x) is x
    state.seeds = (3,)
    assert dropout(x).equal(seeded_dropout(x, 0.5, (3,), "dropout"))
    assert SeededDropout(0.0, state, "dropout")(x) is x


def test_quantised_linears_of_bitsandbytes_are_wrapped() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    eight = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    four = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    assert linear_features(eight) == (IN, OUT)
    assert linear_features(four) == (64, 32)
    layer = LoraLinear(four.to("cpu"), draw(RANK, 64).float(), draw(32, RANK).float(), scaling=0.5)
    x = draw(3, 64).float()
    torch.testing.assert_close(layer(x), four(x) + 0.5 * (x @ layer.a.T) @ layer.b.T)
    layer(x).sum().backward()
    assert layer.a.grad is not None
    before, delta = layer(x), draw(32, 64, seed=4).float()
    layer.set_delta(BaseDelta(delta, None))
    torch.testing.assert_close(layer(x), before + x @ delta.T, rtol=1e-5, atol=1e-4)


# masks of clients whose batches are padded to a common shape

OWN, PADDED = (2, 3), (4, 5)


@pytest.mark.parametrize("features", [(6,), (2, 3), (5,)], ids=str)
@pytest.mark.parametrize("form", ["rows and tokens", "flattened", "rows"])
def test_a_padded_client_draws_the_masks_of_its_own_batch(form: str, features: tuple[int, ...]) -> None:
    # (5,): as many features as padded tokens, so that (rows, features) looks like (rows, tokens).
    shapes = {"rows and tokens": (*PADDED, *features), "flattened": (20, *features), "rows": (4, *features)}
    own = {"rows and tokens": (*OWN, *features), "flattened": (6, *features), "rows": (2, *features)}[form]
    x = torch.ones(shapes[form])
    alone = seeded_dropout(torch.ones(own), 0.5, (7,), "m")
    other = seeded_dropout(torch.ones(shapes[form]), 0.5, (8,), "m")
    both = seeded_dropout(torch.cat([x, x]), 0.5, (7, 8), "m", own_shapes=(OWN, PADDED), padded_shape=PADDED)
    first, second = both.chunk(2)
    assert second.equal(other)
    if form == "flattened":
        first, alone = first.view(*PADDED, *features), alone.view(*OWN, *features)
    inside = first[:2] if form == "rows" else first[:2, :3]
    assert inside.equal(alone)
    kept = torch.full_like(first, 2.0)
    (kept[:2] if form == "rows" else kept[:2, :3]).copy_(alone)
    assert first.equal(kept), "padding is kept"


def test_an_empty_client_draws_nothing() -> None:
    x = torch.ones(8, 5, 3)
    dropped = seeded_dropout(x, 0.5, (7, 8), "m", own_shapes=((0, 0), PADDED), padded_shape=PADDED)
    assert dropped[:4].equal(torch.full((4, 5, 3), 2.0))
    assert dropped[4:].equal(seeded_dropout(x[4:], 0.5, (8,), "m"))


def test_a_head_of_a_stack_sees_the_rows_of_its_clients() -> None:
    copies = [nn.Linear(IN, 2) for _ in range(4)]
    head = StackedHead(copies)
    x = draw(8, IN, dtype=torch.float32)
    assert head(x).equal(torch.cat([copy(share) for copy, share in zip(copies, x.chunk(4), strict=True)]))
    head.activate(1, 3)
    assert head(x).equal(torch.cat([copies[1](x[:4]), copies[2](x[4:])]))
    head.activate(3, 4)
    assert head(x).equal(copies[3](x))
    head.activate(0, 3)
    with pytest.raises(AdapterError, match="a head: a batch of 8 rows for a stack of 3"):
        head(x)


def test_a_head_of_a_stack_draws_its_clients_masks() -> None:
    state = DropoutState()
    head = StackedHead([nn.Sequential(SeededDropout(0.5, state, "m")) for _ in range(3)])
    x = torch.ones(4, 50)
    state.seeds = (7, 8)
    head.activate(1, 3)
    assert head(x).equal(seeded_dropout(x, 0.5, (7, 8), "m"))
    head.activate(0, 2)
    assert head(x).equal(seeded_dropout(x, 0.5, (7, 8), "m"))
