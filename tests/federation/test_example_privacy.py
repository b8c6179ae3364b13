"""Example-level privacy: the step is the mean of clipped gradients and noise, and batches depend on no length."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sfedlora.data.batches import plan_local_batches
from sfedlora.federation.client import ClientWork, LocalTraining, TrainingSetup, _plan, train_client
from sfedlora.privacy.accounting import epsilon_of_rounds, epsilon_of_steps
from sfedlora.privacy.examples import ExamplePrivacy, most_uses
from sfedlora.privacy.mechanism import Privacy
from sfedlora.types import LoraSize, Part, Tensors
from support.tiny_federation import PAD, TRAINING, adapted, random_text

Dense = NDArray[np.float64]

RATE = 0.1
ROWS = (3, 8, 11, 20)
STEP = replace(TRAINING, batch_size=4, local_steps=1)
QUIET = ExamplePrivacy(clip_norm=0.05, noise_multiplier=1e-12, delta=1e-5)
LOUD = replace(QUIET, noise_multiplier=2.0)


def flat(tensors: Tensors) -> Dense:
    joined: Dense = np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])
    return joined


def change(training: LocalTraining, rows: tuple[int, ...] = ROWS, *, key: bytes = b"key") -> Dense:
    """What training adds to all factors, in steps of the learning rate: minus the gradient for one SGD step."""
    resident = adapted(rank=4)
    rng = np.random.default_rng(5)
    start = {name: tensor + 0.05 * float(rng.normal()) for name, tensor in resident.read().items()}
    setup = TrainingSetup(resident, random_text(30), training, "causal-lm", PAD, 0)
    work = ClientWork("a", 1, start, frozenset({Part.A, Part.B}), LoraSize(4, 2.0), RATE, rows, {}, noise_key=key)
    return (flat(train_client(setup, work).tensors) - flat(start)) / RATE


def test_a_step_is_the_mean_of_the_clipped_gradients_of_its_examples() -> None:
    each = [-change(replace(STEP, batch_size=1), (row,)) for row in ROWS]  # one example alone, without privacy
    norms = [float(np.linalg.norm(gradient)) for gradient in each]
    clip_norm = float(np.median(norms))
    privacy = replace(QUIET, clip_norm=clip_norm)
    expected = sum(gradient * min(1.0, clip_norm / norm) for gradient, norm in zip(each, norms, strict=True)) / 4
    found = -change(replace(STEP, example_privacy=privacy))
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-4 * largest)
    assert np.abs(found - sum(each) / 4).max() > 1e-2 * largest


def test_the_noise_has_the_stated_size_and_another_one_is_caught() -> None:
    added = change(replace(STEP, example_privacy=LOUD)) - change(replace(STEP, example_privacy=QUIET))

    def fits(std: float) -> bool:
        count = len(added)
        variance_fits = abs(added.var() / std**2 - 1) < 3.3 * math.sqrt(2 / count)
        return bool(variance_fits and stats.kstest(added / std, "norm").statistic < 1.95 / math.sqrt(count))

    std = 2.0 * 0.05 / 4
    assert len(added) > 1000
    assert fits(std)
    assert not fits(0.85 * std)
    assert not fits(1.15 * std)


def test_noise_follows_the_key() -> None:
    training = replace(STEP, example_privacy=LOUD)
    first = change(training)
    assert (first == change(training)).all()
    assert not np.allclose(first, change(training, key=b"other"), atol=1e-3)


def test_a_longer_example_changes_no_batch_of_the_others() -> None:
    training = replace(TRAINING, local_steps=5, example_privacy=LOUD)
    work = ClientWork("a", 1, {}, frozenset(), LoraSize(4, 2.0), RATE, tuple(range(17)), {})
    plans = []
    for seed in (0, 1, 2):  # other texts, of other lengths
        setup = TrainingSetup(adapted(), random_text(30, seed=seed), training, "causal-lm", PAD, 0)
        plans.append([rows.tolist() for step in _plan(setup, work) for rows in step])
        plain = replace(setup, training=replace(training, example_privacy=None))
        assert [rows.tolist() for step in _plan(plain, work) for rows in step] != plans[-1]
    assert plans[0] == plans[1] == plans[2]


@given(
    num_examples=st.integers(1, 300), batch_size=st.integers(1, 40), steps=st.integers(1, 30), seed=st.integers(0, 9)
)
def test_no_example_is_used_more_often_than_is_accounted(
    num_examples: int, batch_size: int, steps: int, seed: int
) -> None:
    plan = plan_local_batches(
        np.ones(num_examples, np.int64),
        range(num_examples),
        batch_size=batch_size,
        local_steps=steps,
        local_epochs=None,
        accumulation=1,
        seed=seed,
    )
    uses = np.bincount(np.concatenate([rows for step in plan for rows in step]), minlength=num_examples)
    assert uses.max() <= most_uses(num_examples, batch_size=batch_size, local_steps=steps, local_epochs=None)
    assert all(len(step) == 1 and len({*step[0].tolist()}) == len(step[0]) for step in plan)
    assert most_uses(num_examples, batch_size=batch_size, local_steps=None, local_epochs=3) == 3


def test_an_example_spends_like_a_client_of_as_many_rounds() -> None:
    client = Privacy("local", 1.0, 2.0, 1e-5, num_clients=3, cohort_size=3)
    assert epsilon_of_steps(LOUD, 7) == epsilon_of_rounds(client, 7)


@pytest.mark.parametrize("steps", [1, 3])
def test_optimizers_with_state_take_it(steps: int) -> None:
    training = replace(STEP, optimizer="adamw", local_steps=steps, example_privacy=LOUD)
    assert np.isfinite(change(training)).all()
