"""Rounds of a method that trains one factor at a time: what stands still, what is sent, which moments are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfedlora.federation.round import ClientTrained, run_rounds
from sfedlora.federation.sampling import sample_cohort
from sfedlora.federation.state import initial_state
from sfedlora.types import Part, Tensors, part_of, select_parts
from support.tiny_federation import ROUNDS, TRAINING, Ran, run_all, tiny_federation

FOUR = replace(ROUNDS, num_rounds=4)
KEEPING = replace(TRAINING, optimizer="adamw", keep_optimizer_state=True)


def size(tensors: Tensors, *parts: Part) -> int:
    return sum(4 * tensor.numel() for tensor in select_parts(tensors, parts).values())


def moved(ran: Ran, round_num: int) -> set[Part]:
    before, after = (ran.states[number].server.shared for number in (round_num - 1, round_num))
    return {part_of(name) for name in after if not after[name].equal(before[name])}


def test_b_moves_in_odd_rounds_and_a_in_even_ones() -> None:
    ran = run_all(tiny_federation(method="rolora", rounds=FOUR))
    assert [moved(ran, number) for number in (1, 2, 3, 4)] == [{Part.B}, {Part.A}, {Part.B}, {Part.A}]
    for record, trained in zip(ran.records, "baba", strict=True):
        assert (record["grad_norm_a"] is not None, record["grad_norm_b"] is not None) == (
            trained == "a",
            trained == "b",
        )


def test_the_head_moves_in_every_round() -> None:
    ran = run_all(tiny_federation(method="rolora", task="sequence-classification", rounds=FOUR))
    assert all(Part.HEAD in moved(ran, number) for number in (1, 2, 3, 4))


def test_up_goes_what_is_trained_and_down_what_changed_before() -> None:
    ran = run_all(tiny_federation(method="rolora", rounds=FOUR))
    a, b = (4 * size(ran.states[0].server.shared, part) for part in (Part.A, Part.B))
    assert a != b
    assert [record["bytes_up"] for record in ran.records] == [b, a, b, a]
    assert [record["bytes_down"] for record in ran.records] == [a, b, a, b]


def test_a_client_that_missed_a_round_is_sent_both_factors() -> None:
    rounds = replace(ROUNDS, num_rounds=6, cohort_size=2)
    federation = tiny_federation(method="rolora", rounds=rounds)
    ran = run_all(federation)
    a, b = (size(ran.states[0].server.shared, part) for part in (Part.A, Part.B))
    cohorts = [sample_cohort("abcd", 2, seed=0, round_num=number) for number in range(1, 7)]
    assert [tuple(record["cohort"]) for record in ran.records] == cohorts
    newcomers = []
    for number in range(2, 7):
        late = set(cohorts[number - 1]) - set(cohorts[number - 2])
        newcomers.append(len(late))
        changed = b if number % 2 == 0 else a
        assert ran.records[number - 1]["bytes_down"] == len(late) * (a + b) + (2 - len(late)) * changed
    assert len(set(newcomers)) > 1
    assert ran.records[0]["bytes_down"] == 2 * a


@pytest.mark.parametrize("method", ["fedsa", "fedit", "ffa", "flexlora", "hetlora", "fair"])
def test_other_methods_send_the_same_to_everybody(method: str) -> None:
    ran = run_all(tiny_federation(method=method, rounds=replace(ROUNDS, num_rounds=3, cohort_size=2)))
    assert all(record["bytes_down"] == record["bytes_up"] > 0 for record in ran.records)


def test_the_moments_of_the_factor_that_stands_still_are_kept_as_they_are() -> None:
    ran = run_all(tiny_federation(method="rolora", training=KEEPING, rounds=FOUR))
    for number in (2, 3, 4):
        still = "b" if number % 2 == 0 else "a"
        before, after = (ran.states[at].optimizer["c"] for at in (number - 1, number))
        kept = [key for key in before if key.startswith(f"{still}/")]
        assert len(kept) == (0 if number == 1 else 3)
        assert all(after[key].equal(before[key]) for key in kept)
    steps = {key: int(value) for key, value in ran.states[4].optimizer["c"].items() if key.endswith("/step")}
    assert steps == {"a/step": 6, "b/step": 6}


def test_kept_moments_are_used_when_the_factor_is_trained_again() -> None:
    keeping = run_all(tiny_federation(method="rolora", training=KEEPING, rounds=FOUR)).states
    reset = run_all(
        tiny_federation(method="rolora", training=replace(KEEPING, keep_optimizer_state=False), rounds=FOUR)
    ).states
    for number in (1, 2):
        for name, tensor in keeping[number].server.shared.items():
            assert tensor.equal(reset[number].server.shared[name])
    changed = [
        name for name, tensor in keeping[3].server.shared.items() if not tensor.equal(reset[3].server.shared[name])
    ]
    assert {part_of(name) for name in changed} == {Part.B}


def test_an_interrupted_round_goes_on_with_the_same_bits() -> None:
    federation = tiny_federation(method="rolora", training=KEEPING, rounds=FOUR)
    whole = run_all(federation).states
    done = {}
    for event in run_rounds(federation, whole[2]):
        if isinstance(event, ClientTrained) and event.outcome is not None:
            done[event.client_id] = event.outcome
        if len(done) == 2:
            break
    *_, last = run_rounds(federation, whole[2], done)
    gone_on, expected = last.state, whole[4]  # type: ignore[union-attr]
    assert all(tensor.equal(expected.server.shared[name]) for name, tensor in gone_on.server.shared.items())
    for client, moments in expected.optimizer.items():
        assert moments.keys() == gone_on.optimizer[client].keys()
        assert all(tensor.equal(gone_on.optimizer[client][key]) for key, tensor in moments.items())
    assert torch.isfinite(next(iter(gone_on.server.shared.values()))).all()
    assert initial_state(federation).server.round_num == 0
