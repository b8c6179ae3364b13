"""The oracle itself: hand-computed numbers, and the table of log-log slopes that the scaling law predicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from theory_oracle import Outcome, Toy, effective_count, first_a, gamma, simulate, train

RANKS = (8, 64, 512)
CLIENTS = (2, 8, 32)
SEEDS = (0, 1, 2)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def mean_over_seeds(rule: str, init: str, num_clients: int, rank: int, count: str) -> float:
    runs = [simulate(rule, init, num_clients, rank, count=count, seed=seed) for seed in SEEDS]
    return float(np.mean([run.grad_norms_b[1] for run in runs]))


@pytest.mark.parametrize(
    ("rule", "init", "in_rank", "in_clients"),
    [
        ("lora", "independent", -0.5, -0.5),
        ("rslora", "independent", 0.0, -0.5),
        ("sfed", "independent", 0.0, 0.0),
        ("lora", "shared", -0.5, 0.0),
        ("rslora", "shared", 0.0, 0.0),
        ("sfed", "shared", 0.0, 0.5),
    ],
)
def test_slopes_of_the_gradient_of_b_in_round_2(rule: str, init: str, in_rank: float, in_clients: float) -> None:
    over_rank = [mean_over_seeds(rule, init, 8, rank, "total") for rank in RANKS]
    over_clients = [mean_over_seeds(rule, init, clients, 32, "total") for clients in CLIENTS]
    assert slope(RANKS, over_rank) == pytest.approx(in_rank, abs=0.08)
    assert slope(CLIENTS, over_clients) == pytest.approx(in_clients, abs=0.08)


def test_effective_count_makes_unequal_weights_look_like_uniform_ones() -> None:
    zipf = [1 / (index + 1) for index in range(20)]
    uniform = simulate("sfed", "independent", 20, 64).grad_norms_b[1]
    effective = simulate("sfed", "independent", 20, 64, zipf).grad_norms_b[1]
    total = simulate("sfed", "independent", 20, 64, zipf, count="total").grad_norms_b[1]
    assert effective == pytest.approx(uniform, rel=0.05)
    assert total > 1.4 * uniform


def test_gain_is_constant_under_sfed() -> None:
    gains = [
        np.mean([simulate("sfed", "independent", clients, rank, seed=seed).gains[1] for seed in SEEDS])
        for clients in (2, 8, 32)
        for rank in (32, 512)
    ]
    assert max(gains) / min(gains) < 1.1


def test_the_first_step_of_sfed_is_that_of_rslora_with_a_rescaled_once() -> None:
    # A' = sqrt(N) A carries one into the other as long as A has not moved, which it has not in the first step (B = 0).
    one = simulate("sfed", "independent", 4, 16, num_rounds=1, num_steps=1)
    two = simulate("rslora", "reinit", 4, 16, num_rounds=1, num_steps=1)
    assert one.losses[1] < one.losses[0]
    assert one.losses[1] == pytest.approx(two.losses[1], rel=1e-12)


def test_one_learning_rate_orders_the_rules_on_the_toy() -> None:
    runs = [
        simulate(rule, "independent", 16, 128, num_rounds=6, learning_rate=0.002) for rule in ("sfed", "rslora", "lora")
    ]
    drops = [1 - run.losses[-1] / run.losses[0] for run in runs]
    assert drops[0] > 2 * drops[1] > 4 * drops[2] > 0


def test_one_step_by_hand() -> None:
    # One client, one example x = 2, target 3, A = 1/2, B = 0, gamma = 4: error -3, dL/dB = 4 * (-3 * 2) * 1/2 = -12.
    toy = Toy(np.array([[[2.0]]]), np.array([[[3.0]]]))
    run: Outcome = train(toy, np.array([[[0.5]]]), 4.0, np.array([1.0]), num_rounds=1, num_steps=1, learning_rate=0.01)
    assert run.grad_norms_b == pytest.approx([12.0])
    assert run.gains == pytest.approx([4.0])  # 16 * 1/4 / 1
    assert run.b[0, 0, 0] == pytest.approx(0.12)
    assert run.a[0, 0] == pytest.approx(0.5)  # B was 0, so A did not move
    assert run.losses == pytest.approx([4.5, 0.5 * (4 * 0.12 * 0.5 * 2 - 3) ** 2])


def test_rules_and_starts_by_hand() -> None:
    assert [gamma(rule, 16.0, 4, 9.0) for rule in ("lora", "rslora", "sfed")] == [4.0, 8.0, 24.0]
    assert effective_count(np.array([0.5, 0.25, 0.25])) == pytest.approx(8 / 3)
    draws, weights = np.array([[[1.0]], [[5.0]]]), np.array([0.75, 0.25])
    starts = {init: first_a(init, draws, weights)[:, 0, 0].tolist() for init in ("independent", "local", "shared")}
    assert starts == {"independent": [2.0, 2.0], "local": [1.0, 5.0], "shared": [1.0, 1.0]}
    assert first_a("reinit", draws, weights)[0, 0, 0] == pytest.approx(2.0 * 1.6**0.5)
