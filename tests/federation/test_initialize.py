"""The initial A: draws, their average, and the count of clients that the average stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfedlora.federation.initialize import MAX_DRAWN_CLIENTS, draw_a, form_initial_a
from sfedlora.types import AdapterLayout, Target, Tensors

LAYOUT = AdapterLayout((Target("first", 64, 8), Target("block.second", 200, 64)), {})
BIG = AdapterLayout((Target("one", 512, 8), Target("two", 512, 8)), {})
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def stacked(tensors: Tensors) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors.values()])


def equal(left: Tensors, right: Tensors) -> bool:
    return list(left) == list(right) and all(left[name].equal(right[name]) for name in left)


def test_a_draw_depends_on_seed_owner_and_module_only() -> None:
    own = draw_a(LAYOUT, 4, seed=1, owner="a")
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {
        "a:first": (4, 64),
        "a:block.second": (4, 200),
    }
    backwards = draw_a(AdapterLayout(LAYOUT.targets[::-1], {}), 4, seed=1, owner="a")
    assert all(backwards[name].equal(own[name]) for name in own)
    torch.manual_seed(0)
    assert equal(draw_a(LAYOUT, 4, seed=1, owner="a"), own)
    for other in (draw_a(LAYOUT, 4, seed=2, owner="a"), draw_a(LAYOUT, 4, seed=1, owner="b")):
        assert all(not other[name].equal(own[name]) for name in own)


def test_draws_have_the_variance_of_stock_peft() -> None:
    own = draw_a(BIG, 64, seed=0, owner="a")
    peft_default = torch.empty(64, 512)
    torch.nn.init.kaiming_uniform_(peft_default, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    for tensor in own.values():
        assert tensor.dtype == torch.float32
        assert float(tensor.var()) == pytest.approx(1 / (3 * 512), rel=0.03)
        assert float(tensor.var()) == pytest.approx(float(peft_default.var()), rel=0.04)
        assert abs(float(tensor.mean())) < 5 / math.sqrt(3 * 512 * tensor.numel())
    assert abs(float(torch.corrcoef(torch.stack([t.flatten() for t in own.values()]))[0, 1])) < 0.03


@pytest.mark.parametrize("init", ["independent", "local"])
def test_the_initial_a_is_the_weighted_mean_of_the_draws(init: str) -> None:
    formed = form_initial_a(LAYOUT, 4, weights=WEIGHTS, init=init, seed=5)  # type: ignore[arg-type]
    draws = {client: draw_a(LAYOUT, 4, seed=5, owner=client) for client in WEIGHTS}
    for name, tensor in formed.tensors.items():
        by_hand = sum(WEIGHTS[client] * draws[client][name].double().numpy() for client in WEIGHTS)
        np.testing.assert_allclose(tensor.double().numpy(), by_hand, atol=1e-7)
    assert formed.effective_clients == pytest.approx(1 / 0.38)


def test_the_order_of_clients_changes_no_bit() -> None:
    backwards = dict(reversed(WEIGHTS.items()))
    one = form_initial_a(LAYOUT, 4, weights=WEIGHTS, init="independent", seed=5)
    assert equal(form_initial_a(LAYOUT, 4, weights=backwards, init="independent", seed=5).tensors, one.tensors)


def test_shared_is_one_draw_that_no_client_changes() -> None:
    one = form_initial_a(BIG, 8, weights=WEIGHTS, init="shared", seed=5)
    two = form_initial_a(BIG, 8, weights={"z": 1.0}, init="shared", seed=5)
    assert equal(one.tensors, two.tensors)
    assert (one.effective_clients, one.measured_clients) == (1.0, None)
    assert float(one.tensors["a:one"].var()) == pytest.approx(1 / (3 * 512), rel=0.1)


def test_reinit_gives_the_mean_the_size_of_one_draw() -> None:
    mean = form_initial_a(BIG, 32, weights=WEIGHTS, init="independent", seed=5)
    again = form_initial_a(BIG, 32, weights=WEIGHTS, init="reinit", seed=5)
    np.testing.assert_allclose(stacked(again.tensors), stacked(mean.tensors) / math.sqrt(0.38), rtol=1e-6)
    assert stacked(again.tensors).var() == pytest.approx(1 / (3 * 512), rel=0.03)
    assert again.effective_clients == 1.0


@pytest.mark.parametrize("num_clients", [2, 8, 64])
def test_the_measured_count_is_near_the_number_of_clients(num_clients: int) -> None:
    weights = {f"c{number}": 1 / num_clients for number in range(num_clients)}
    formed = form_initial_a(BIG, 16, weights=weights, init="independent", seed=2)
    assert formed.effective_clients == pytest.approx(num_clients)
    assert formed.measured_clients == pytest.approx(num_clients, rel=0.05)


def test_the_measured_count_follows_unequal_weights() -> None:
    raw = {f"c{number:02d}": 1 / (number + 1) for number in range(20)}
    weights = {client: weight / sum(raw.values()) for client, weight in raw.items()}
    formed = form_initial_a(BIG, 16, weights=weights, init="independent", seed=2)
    # (sum 1/i)^2 / sum 1/i^2 with H_20 = 3.59774 and the sum of squares 1.59616
    assert formed.effective_clients == pytest.approx(3.59774**2 / 1.59616, rel=1e-4)
    assert formed.measured_clients == pytest.approx(formed.effective_clients, rel=0.05)


@pytest.mark.parametrize(("init", "variance"), [("independent", 1 / (3 * 512) / 1200), ("reinit", 1 / (3 * 512))])
def test_above_the_limit_the_law_of_the_mean_is_drawn(init: str, variance: float) -> None:
    num_clients = 1200
    assert num_clients > MAX_DRAWN_CLIENTS
    weights = {f"c{number}": 1 / num_clients for number in range(num_clients)}
    formed = form_initial_a(BIG, 32, weights=weights, init=init, seed=2)  # type: ignore[arg-type]
    assert formed.measured_clients is None
    assert stacked(formed.tensors).var() == pytest.approx(variance, rel=0.03)
    assert formed.effective_clients == pytest.approx(1 if init == "reinit" else 1200)


def test_drawn_and_law_have_the_same_variance_at_the_limit() -> None:
    layout = AdapterLayout((Target("one", 128, 8),), {})
    variances = []
    for num_clients in (MAX_DRAWN_CLIENTS, MAX_DRAWN_CLIENTS + 1):
        weights = {f"c{number}": 1 / num_clients for number in range(num_clients)}
        formed = form_initial_a(layout, 32, weights=weights, init="independent", seed=4)
        variances.append(stacked(formed.tensors).var())
    assert variances[0] == pytest.approx(variances[1], rel=0.12)
