"""Epsilon against formulas of our own: the exact Gaussian trade-off, and Renyi divergences by numerical integration."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, optimize, special, stats

from sfedlora.errors import ConfigError
from sfedlora.privacy.accounting import epsilon_after, epsilon_of_rounds, require_accounting
from sfedlora.privacy.mechanism import Privacy

PRIVACY = Privacy("central", clip_norm=0.3, noise_multiplier=8.0, delta=1e-5, num_clients=10, cohort_size=10)


def spent(privacy: Privacy, num_rounds: int) -> float:
    found = epsilon_after(privacy, num_rounds)
    assert found is not None
    return found


def exact_epsilon(sensitivity: float, std: float, num_rounds: int, delta: float) -> float:
    """The smallest epsilon of Gaussian noise, by the exact trade-off (Balle and Wang, ICML 2018, theorem 8)."""
    mu = math.sqrt(num_rounds) * sensitivity / std

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(optimize.brentq(excess, 0, 500))


def renyi_epsilon(sensitivity: float, std: float, num_rounds: int, delta: float) -> float:
    """By Renyi divergence T alpha s^2 / (2 std^2), with the conversion of Canonne, Kamath, Steinke, proposition 12."""
    orders = np.linspace(1.01, 200, 40_000)
    divergence = num_rounds * orders * sensitivity**2 / (2 * std**2)
    epsilon = divergence + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(epsilon.min())


@pytest.mark.parametrize("multiplier", [4.0, 8.0, 30.0])
@pytest.mark.parametrize("num_rounds", [1, 10, 50])
@pytest.mark.parametrize("mode", ["central", "local"])
def test_without_sampling_it_is_the_gaussian_mechanism_on_twice_the_clipping_norm(
    multiplier: float, num_rounds: int, mode: str
) -> None:
    privacy = replace(PRIVACY, noise_multiplier=multiplier, mode=mode)  # type: ignore[arg-type]
    sensitivity, std = 2 * privacy.clip_norm, multiplier * privacy.clip_norm
    found = spent(privacy, num_rounds)
    assert found == epsilon_of_rounds(privacy, num_rounds)
    assert found == pytest.approx(renyi_epsilon(sensitivity, std, num_rounds, 1e-5), rel=0.005)
    exact = exact_epsilon(sensitivity, std, num_rounds, 1e-5)
    assert exact <= found <= 1.3 * exact


def sampled_divergence(order: int, ratio: float, std: float) -> float:
    """Renyi divergence of a Gaussian of sensitivity 1 on a sample (arXiv:1808.00087, theorem 27)."""

    def log_moment(power: float) -> float:  # of the Gaussian alone: power (power - 1) / (2 std^2)
        return power * (power - 1) / (2 * std**2)

    total = 1 + ratio**2 * special.comb(order, 2) * min(4 * math.expm1(log_moment(2)), 2 * math.exp(log_moment(2)))
    for power in range(3, order + 1):
        total += ratio**power * special.comb(order, power) * 2 * math.exp(log_moment(power))
    return math.log(total) / (order - 1)


def test_a_sampled_cohort_is_accounted_with_the_bound_for_samples_without_replacement() -> None:
    privacy = replace(PRIVACY, num_clients=100, cohort_size=10)
    found = spent(privacy, 20)
    orders = np.arange(2, 65)
    divergences = np.array([20 * sampled_divergence(int(order), 0.1, 8.0 / 2) for order in orders])
    # The implementation knows a sharper bound on the higher moments, so it may only be below.
    simple = float((divergences + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)).min())
    assert 0.5 * simple < found <= simple * 1.001
    assert found < 0.5 * spent(replace(privacy, num_clients=10), 20)


@pytest.mark.parametrize(("multiplier", "num_clients"), [(1.0, 20), (2.0, 50), (4.0, 100)])
def test_no_less_is_stated_than_a_real_pair_of_neighbours_costs(multiplier: float, num_clients: int) -> None:
    """One client pulls all one way or all the other, the rest stay where they are: two mixtures, integrated."""
    privacy = replace(PRIVACY, noise_multiplier=multiplier, num_clients=num_clients)
    ratio, grid = 10 / num_clients, np.linspace(-12 * multiplier - 1, 12 * multiplier + 1, 400_001)

    def density(shift: float) -> NDArray[np.float64]:
        law = stats.norm(0, multiplier)
        mixture: NDArray[np.float64] = (1 - ratio) * law.pdf(grid) + ratio * law.pdf(grid - shift)
        return mixture

    one_way, other_way = density(1.0), density(-1.0)

    def excess(epsilon: float) -> float:
        return float(integrate.trapezoid(np.maximum(one_way - math.exp(epsilon) * other_way, 0), grid)) - 1e-5

    found = spent(privacy, 1)
    assert float(optimize.brentq(excess, 1e-6, 50)) < found


def test_drawing_nearly_everybody_costs_no_more_than_drawing_all() -> None:
    assert spent(replace(PRIVACY, num_clients=11), 3) <= spent(PRIVACY, 3)


def test_more_rounds_and_less_noise_cost_more() -> None:
    costs = [spent(PRIVACY, count) for count in (1, 2, 10)]
    assert costs == sorted(costs)
    assert spent(replace(PRIVACY, noise_multiplier=4.0), 2) > costs[1]
    assert spent(replace(PRIVACY, delta=1e-7), 2) > costs[1]


def test_the_clipping_norm_and_the_denominator_do_not_enter() -> None:
    assert epsilon_after(replace(PRIVACY, clip_norm=77.0), 3) == epsilon_after(PRIVACY, 3)
    assert epsilon_after(replace(PRIVACY, num_clients=3, cohort_size=3), 3) == epsilon_after(PRIVACY, 3)


def test_without_dp_accounting_a_private_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_accounting()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sfedlora\[privacy\]'"):
        require_accounting()
