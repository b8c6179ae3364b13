"""Clipping is exact, the noise has the stated size, the denominator is fixed, and the key decides the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sfedlora.errors import RunError
from sfedlora.privacy.mechanism import (
    NOISE_KEY,
    Privacy,
    change_norm,
    noise_key,
    noised_mean,
    privatized,
    with_noise_key,
)
from sfedlora.types import ServerState, Tensors

PRIVACY = Privacy("central", clip_norm=0.5, noise_multiplier=1.3, delta=1e-5, num_clients=40, cohort_size=4)
QUIET = replace(PRIVACY, noise_multiplier=1e-12)
KEY = bytes(range(32))
Dense = NDArray[np.float64]
Shapes = dict[str, tuple[int, ...]]

SHAPES: Shapes = {"a:x": (4, 30), "a:y": (4, 50), "head:c": (3,)}
LARGE: Shapes = {"a:x": (50, 4000), "a:y": (50, 2000)}


def drawn(seed: int, scale: float = 1.0, shapes: Shapes = SHAPES) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.tensor(scale * rng.normal(size=shape), dtype=torch.float32) for name, shape in shapes.items()}


def flat(tensors: Tensors) -> Dense:
    joined: Dense = np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])
    return joined


def moved(before: Tensors, scale: float, seed: int) -> dict[str, torch.Tensor]:
    own = drawn(seed, scale, {name: tuple(tensor.shape) for name, tensor in before.items()})
    return {name: tensor + own[name] for name, tensor in before.items()}


def clipped(before: Tensors, after: Tensors, clip_norm: float) -> Dense:
    change = flat(after) - flat(before)
    short: Dense = change * min(1.0, clip_norm / max(float(np.linalg.norm(change)), 1e-300))
    return short


@pytest.mark.parametrize("scales", [(1.0, 2.0, 0.5, 10.0), (1e-3, 2e-3, 1e-3, 3e-3), (1e-3, 5.0, 1e30, 1e-30)])
def test_the_mean_of_clipped_changes(scales: tuple[float, ...]) -> None:
    before = drawn(0)
    updates = [moved(before, scale, seed) for seed, scale in enumerate(scales)]
    release = noised_mean(QUIET, before, iter(updates), round_num=1, key=KEY)
    expected = sum(clipped(before, update, 0.5) for update in updates) / 4
    np.testing.assert_allclose(flat(release.tensors) - flat(before), expected, atol=3e-7)
    norms = [float(np.linalg.norm(flat(update) - flat(before))) for update in updates]
    np.testing.assert_allclose(release.norms, norms, rtol=1e-12)
    np.testing.assert_allclose([change_norm(before, update) for update in updates], norms, rtol=1e-12)


@given(scale=st.floats(1e-4, 1e20), clip_norm=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_no_client_moves_the_sum_by_more_than_the_clipping_norm(scale: float, clip_norm: float, seed: int) -> None:
    before = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    update = {name: tensor.double() for name, tensor in drawn(seed, scale).items()}
    one = replace(QUIET, clip_norm=clip_norm, cohort_size=1, noise_multiplier=1e-18)
    release = noised_mean(one, before, [update], round_num=1, key=KEY)
    norm = float(np.linalg.norm(flat(update)))
    length = float(np.linalg.norm(flat(release.tensors)))
    assert length <= clip_norm * (1 + 1e-12)
    assert length == pytest.approx(min(norm, clip_norm), rel=1e-9)


def test_the_denominator_does_not_depend_on_who_replied() -> None:
    before = drawn(0)
    updates = [moved(before, 1.0, seed) for seed in range(4)]
    four = flat(noised_mean(QUIET, before, updates, round_num=1, key=KEY).tensors)
    three = flat(noised_mean(QUIET, before, updates[:3], round_num=1, key=KEY).tensors)
    # One client that stays away moves the result by its own share and no more.
    np.testing.assert_allclose(four - three, clipped(before, updates[3], 0.5) / 4, atol=3e-7)
    with pytest.raises(RunError, match="5 updates, but the noise was planned for 4"):
        noised_mean(QUIET, before, [*updates, updates[0]], round_num=1, key=KEY)


def noise_of(privacy: Privacy, *, round_num: int = 1, key: bytes = KEY) -> Dense:
    """What is added to two changes that are known."""
    before = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in LARGE.items()}
    update = {name: tensor.double() for name, tensor in drawn(5, 1e-5, LARGE).items()}
    if privacy.mode == "central":
        release = noised_mean(privacy, before, [update, update], round_num=round_num, key=key)
        return flat(release.tensors) - 2 * flat(update) / privacy.cohort_size
    return flat(privatized(privacy, before, update, round_num=round_num, key=key).tensors) - flat(update)


def fits(values: Dense, std: float) -> bool:
    """Variance and law, at a level of about 0.1 %."""
    count = len(values)
    variance_fits = abs(values.var() / std**2 - 1) < 3.3 * math.sqrt(2 / count)
    return bool(variance_fits and stats.kstest(values / std, "norm").statistic < 1.95 / math.sqrt(count))


@pytest.mark.parametrize(("mode", "std"), [("central", 1.3 * 0.5 / 4), ("local", 1.3 * 0.5)])
def test_the_noise_has_the_stated_size_and_another_one_is_caught(mode: str, std: float) -> None:
    privacy = replace(PRIVACY, mode=mode)  # type: ignore[arg-type]
    assert privacy.noise_std == pytest.approx(std)
    values = noise_of(privacy)
    assert len(values) == 300_000
    assert fits(values, std)
    for wrong in (0.98, 1.02, 0.5, 2.0):
        assert not fits(noise_of(replace(privacy, noise_multiplier=1.3 * wrong)), std)
    halves = values[: len(values) // 2], values[len(values) // 2 :]
    assert abs(float(np.corrcoef(*halves)[0, 1])) < 0.01


@pytest.mark.parametrize("mode", ["central", "local"])
def test_noise_differs_by_round_and_key_and_repeats_otherwise(mode: str) -> None:
    privacy = replace(PRIVACY, mode=mode)  # type: ignore[arg-type]
    first = noise_of(privacy)
    assert (first == noise_of(privacy)).all()
    for other in (noise_of(privacy, round_num=2), noise_of(privacy, key=bytes(32))):
        assert abs(float(np.corrcoef(first, other)[0, 1])) < 0.01


def test_a_round_that_is_repeated_with_other_replies_has_other_noise() -> None:
    before = drawn(0, shapes=LARGE)
    updates = [moved(before, 1e-3, seed) for seed in range(4)]
    four, three = (noised_mean(PRIVACY, before, sent, round_num=1, key=KEY).tensors for sent in (updates, updates[:3]))
    difference = flat(four) - flat(three) - clipped(before, updates[3], 0.5) / 4
    assert fits(difference, math.sqrt(2) * PRIVACY.noise_std)


def test_the_order_of_names_changes_no_bit() -> None:
    before = drawn(0)
    update = moved(before, 1.0, 1)
    backwards = {name: before[name] for name in reversed(before)}
    first = noised_mean(PRIVACY, before, [update], round_num=1, key=KEY).tensors
    second = noised_mean(PRIVACY, backwards, [update], round_num=1, key=KEY).tensors
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_a_client_sends_its_clipped_change_with_noise_and_what_it_sends_alone() -> None:
    before = drawn(0)
    sent = {name: tensor for name, tensor in moved(before, 1.0, 3).items() if name != "head:c"}
    release = privatized(replace(QUIET, mode="local"), before, sent, round_num=1, key=KEY)
    assert list(release.tensors) == list(sent)
    known = {name: before[name] for name in sent}
    np.testing.assert_allclose(flat(release.tensors) - flat(known), clipped(known, sent, 0.5), atol=3e-7)
    assert {tensor.dtype for tensor in release.tensors.values()} == {torch.float32}


def test_the_key_is_drawn_once_or_comes_from_the_seed() -> None:
    state = ServerState(0, drawn(0), {"momentum/a:x": torch.zeros(2)})
    keyed = with_noise_key(PRIVACY, state)
    assert set(keyed.extra) == {"momentum/a:x", NOISE_KEY}
    assert with_noise_key(PRIVACY, keyed) is keyed
    assert len(noise_key(PRIVACY, keyed)) == 32
    assert noise_key(PRIVACY, keyed) != noise_key(PRIVACY, with_noise_key(PRIVACY, state))
    seeded = replace(PRIVACY, noise_seed=7)
    assert with_noise_key(seeded, state) is state
    assert noise_key(seeded, state) == noise_key(seeded, keyed) != noise_key(replace(PRIVACY, noise_seed=8), state)
    assert with_noise_key(None, state) is state
    with pytest.raises(RunError, match="no noise key"):
        noise_key(PRIVACY, state)
