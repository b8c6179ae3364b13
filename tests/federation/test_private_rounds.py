"""Rounds with privacy: what the server and the clients release, what is recorded, and what stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from federation.capturing import captured
from sfedlora.federation.sampling import most_rounds, sample_cohort
from sfedlora.federation.server_optimizer import ServerOptimizer
from sfedlora.federation.state import Federation
from sfedlora.privacy.accounting import epsilon_after, epsilon_of_rounds
from sfedlora.privacy.mechanism import NOISE_KEY, Privacy
from sfedlora.types import Part, Tensors, select_parts
from support.tiny_federation import ROUNDS, run_all, tiny_federation

CENTRAL = Privacy(
    "central", clip_norm=0.05, noise_multiplier=4.0, delta=1e-4, num_clients=4, cohort_size=4, noise_seed=3
)
LOCAL = replace(CENTRAL, mode="local")
UNIFORM = replace(ROUNDS, weighting="uniform")


def private(privacy: Privacy | None, method: str = "fedsa", **changes: Any) -> Federation:
    rounds = replace(UNIFORM, privacy=privacy, **changes)
    return tiny_federation(
        method=method, rounds=rounds, init="independent" if method == "fedsa" else "shared", rule="rslora"
    )


def flat(tensors: Tensors) -> NDArray[np.float64]:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def is_noise(values: NDArray[np.float64], std: float) -> bool:
    count = len(values)
    return bool(
        abs(values.std() / std - 1) < 3.5 / np.sqrt(2 * count)
        and stats.kstest(values / std, "norm").statistic < 1.95 / np.sqrt(count)
    )


@pytest.mark.parametrize(("method", "parts"), [("fedsa", ["a"]), ("ffa", ["b"]), ("fedit", ["a", "b"])])
def test_the_server_releases_the_mean_of_clipped_changes_and_noise(method: str, parts: list[str]) -> None:
    ran, runner = captured(private(CENTRAL, method))
    for number, record in enumerate(ran.records, start=1):
        before = flat(select_parts(ran.states[number - 1].server.shared, map(Part, parts)))
        after = flat(select_parts(ran.states[number].server.shared, map(Part, parts)))
        changes = [
            flat(select_parts(outcome.tensors, map(Part, parts))) - before
            for outcome in runner.outcomes
            if outcome.round_num == number
        ]
        norms = np.array([np.linalg.norm(change) for change in changes])
        mean = sum(change * min(1.0, 0.05 / float(norm)) for change, norm in zip(changes, norms, strict=True)) / 4
        assert is_noise(after - before - mean, 4.0 * 0.05 / 4)
        assert record["privacy"]["clip_fraction"] == np.mean(norms > 0.05)
        assert record["privacy"]["noise_std"] == pytest.approx(0.05)


def test_a_client_sends_noise_on_its_own_change_and_keeps_what_is_its_own() -> None:
    ran, runner = captured(private(LOCAL, num_rounds=1))
    before, after = (flat(select_parts(ran.states[at].server.shared, [Part.A])) for at in (0, 1))
    outcomes = [outcome for outcome in runner.outcomes if outcome.round_num == 1]
    changes = [flat(select_parts(outcome.tensors, [Part.A])) - before for outcome in outcomes]
    clipped = [change * min(1.0, 0.05 / float(np.linalg.norm(change))) for change in changes]
    assert is_noise(after - before - sum(clipped) / 4, 4.0 * 0.05 / 2)  # four noises of 0.2, averaged
    assert ran.records[0]["privacy"]["clip_fraction"] == np.mean([np.linalg.norm(change) > 0.05 for change in changes])
    for outcome in outcomes:
        kept = ran.states[1].personal[outcome.client_id]
        assert kept
        assert all(tensor.equal(outcome.tensors[name]) for name, tensor in kept.items())


@pytest.mark.parametrize("method", ["rolora", "flora", "fedex", "hetlora"])
def test_local_noise_goes_with_every_method_that_sends(method: str) -> None:
    ran, quiet = (run_all(private(privacy, method, num_rounds=1)) for privacy in (LOCAL, None))
    assert not np.allclose(flat(ran.states[-1].server.shared), flat(quiet.states[-1].server.shared), atol=1e-3) or any(
        not np.allclose(tensor.numpy(), quiet.states[-1].server.extra[name].numpy(), atol=1e-3)
        for name, tensor in ran.states[-1].server.extra.items()
    )


def test_what_is_recorded_can_be_written_and_grows() -> None:
    rounds: dict[str, Any] = {"num_rounds": 2, "cohort_size": 2}
    privacy = replace(CENTRAL, cohort_size=2)
    ran = run_all(private(privacy, **rounds))
    spent = [record["privacy"] for record in ran.records]
    json.dumps(spent)
    for number, record in enumerate(spent, start=1):
        most = most_rounds(list("abcd"), 2, seed=0, num_rounds=number)
        assert record["epsilon"] == epsilon_after(privacy, number)
        assert record["epsilon_cohorts_known"] == epsilon_of_rounds(privacy, most)
        assert (record["mode"], record["delta"]) == ("central", 1e-4)
    assert [record["epsilon"] for record in spent] == sorted(record["epsilon"] for record in spent)
    local = run_all(private(replace(privacy, mode="local"), **rounds)).records[-1]["privacy"]
    assert local["epsilon"] == local["epsilon_cohorts_known"] == spent[-1]["epsilon_cohorts_known"]


def test_rounds_of_the_client_that_was_drawn_most_often() -> None:
    clients = [f"c{number}" for number in range(7)]
    counts = dict.fromkeys(clients, 0)
    for round_num in range(1, 12):
        for client_id in sample_cohort(clients, 3, seed=5, round_num=round_num):
            counts[client_id] += 1
        assert most_rounds(clients, 3, seed=5, num_rounds=round_num) == max(counts.values())
    assert most_rounds(clients, None, seed=5, num_rounds=9) == most_rounds(clients, 7, seed=5, num_rounds=9) == 9


def test_without_privacy_nothing_is_recorded_and_no_key_is_drawn() -> None:
    ran = run_all(private(None))
    assert "privacy" not in ran.records[0]
    assert ran.states[-1].server.extra == {}


def test_a_secret_key_lives_in_the_state_from_the_start_and_differs_from_run_to_run() -> None:
    secret = replace(CENTRAL, noise_seed=None)
    first, second = run_all(private(secret)), run_all(private(secret))
    keys = [ran.states[at].server.extra[NOISE_KEY] for ran in (first, second) for at in (0, 1, 2)]
    assert keys[0].equal(keys[1])
    assert keys[0].equal(keys[2])
    assert not keys[0].equal(keys[3])
    assert not np.array_equal(flat(first.states[1].server.shared), flat(second.states[1].server.shared))


def test_a_server_optimizer_works_on_what_is_released_alone() -> None:
    plain = run_all(private(CENTRAL)).states
    stepped = run_all(private(CENTRAL, server_optimizer=ServerOptimizer("fedavgm", 0.5, 0.0, 0.0, 1e-3))).states
    half = (flat(plain[0].server.shared) + flat(plain[1].server.shared)) / 2
    np.testing.assert_allclose(flat(stepped[1].server.shared), half, atol=1e-6)


@pytest.mark.parametrize(("privacy", "denominator"), [(CENTRAL, 4), (LOCAL, 2)])
def test_less_noise_than_stated_is_caught(privacy: Privacy, denominator: int) -> None:
    """The check of the noise above sees a multiplier of 3 that is stated as 4."""
    ran, _ = captured(private(replace(privacy, clip_norm=1e-3, noise_multiplier=3.0), num_rounds=1))
    added = flat(ran.states[1].server.shared) - flat(ran.states[0].server.shared)
    assert is_noise(added, 3e-3 / denominator)  # the clipped changes are a hundredth of it in any one entry
    assert not is_noise(added, 4e-3 / denominator)
