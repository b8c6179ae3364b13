"""Server optimizers against numbers worked out by hand, and over the rounds of a federation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch

from sfedlora.artifacts import Checkpoint, Checkpoints, CheckpointWriter
from sfedlora.errors import RunError
from sfedlora.federation.round import RoundFinished, run_rounds
from sfedlora.federation.server_optimizer import ServerOptimizer, apply_server_optimizer
from sfedlora.types import Part, ServerState, Tensors, part_of
from support.tiny_federation import ROUNDS, run_all, tiny_federation

Name = Literal["fedavgm", "fedadam", "fedyogi"]
X = "a:layer"
PROGRESS = {"initial": None, "best_round": None, "best_loss": None}


def state(value: float | Sequence[float], extra: Tensors | None = None, round_num: int = 0) -> ServerState:
    values = [value] if isinstance(value, float) else list(value)
    return ServerState(round_num, {X: torch.tensor(values), "b:layer": torch.tensor([5.0])}, extra or {})


def rule(
    name: Name, rate: float = 0.5, momentum: float = 0.5, beta2: float = 0.75, tau: float = 0.1
) -> ServerOptimizer:
    return ServerOptimizer(name, rate, momentum, beta2, tau)


def walk(optimizer: ServerOptimizer, changes: Sequence[float], start: float = 1.0) -> list[ServerState]:
    """Rounds in which the method proposes to add the changes."""
    states = [state(start)]
    for number, change in enumerate(changes, start=1):
        before = states[-1]
        proposed = replace(before, round_num=number, shared={**before.shared, X: before.shared[X] + change})
        states.append(apply_server_optimizer(optimizer, before, proposed, [Part.A]))
    return states


# Two rounds with D = 0.4 and then -0.2, from x = 1.
#   fedavgm   m: 0.4, 0.2 - 0.2 = 0                  x: 1 + 0.5 * 0.4 = 1.2, then 1.2
#   fedadam   m: 0.2, 0.1 - 0.1 = 0                  x stays at its first value in round 2
#             v: 0.75 * 0.01 + 0.25 * 0.16 = 0.0475, 0.75 * 0.0475 + 0.25 * 0.04 = 0.045625
#             x: 1 + 0.5 * 0.2 / (sqrt(0.0475) + 0.1)
#   fedyogi   v: 0.01 - 0.25 * 0.16 * sign(0.01 - 0.16) = 0.05, 0.05 - 0.25 * 0.04 * sign(0.05 - 0.04) = 0.04
#             x: 1 + 0.5 * 0.2 / (sqrt(0.05) + 0.1)
HAND: dict[Name, tuple[float, list[float], list[float]]] = {
    "fedavgm": (1.2, [0.4, 0.0], []),
    "fedadam": (1 + 0.1 / (math.sqrt(0.0475) + 0.1), [0.2, 0.0], [0.0475, 0.045625]),
    "fedyogi": (1 + 0.1 / (math.sqrt(0.05) + 0.1), [0.2, 0.0], [0.05, 0.04]),
}


@pytest.mark.parametrize("name", HAND)
def test_two_rounds_by_hand(name: Name) -> None:
    value, momenta, seconds = HAND[name]
    states = walk(rule(name), [0.4, -0.2])
    for reached, momentum in zip(states[1:], momenta, strict=True):
        assert float(reached.shared[X]) == pytest.approx(value, rel=1e-6)
        assert float(reached.extra[f"momentum/{X}"]) == pytest.approx(momentum, abs=1e-7)
    assert [float(reached.extra[f"second_moment/{X}"]) for reached in states[1:] if seconds] == pytest.approx(seconds)
    assert set(states[-1].extra) == {f"momentum/{X}"} | ({f"second_moment/{X}"} if seconds else set())
    assert [reached.round_num for reached in states] == [0, 1, 2]


@pytest.mark.parametrize("name", HAND)
def test_a_third_round_still_remembers_the_first(name: Name) -> None:
    # D = 0.4, 0, 0: m halves every round, so x moves on although nobody asks for it.
    third = walk(rule(name), [0.4, 0.0, 0.0])
    steps = [float(after.shared[X] - before.shared[X]) for before, after in pairwise(third)]
    if name == "fedavgm":
        assert steps == pytest.approx([0.2, 0.1, 0.05])
    elif name == "fedadam":
        v = [0.0475 * 0.75**power for power in range(3)]
        assert steps == pytest.approx([0.1 * 0.5**k / (math.sqrt(v[k]) + 0.1) for k in range(3)], rel=1e-6)
    else:
        assert steps == pytest.approx([0.1 * 0.5**k / (math.sqrt(0.05) + 0.1) for k in range(3)], rel=1e-6)


@pytest.mark.parametrize("name", HAND)
def test_what_was_not_sent_and_the_inputs_stay(name: Name) -> None:
    before = state([1.0, 2.0], {"momentum/b:layer": torch.tensor([3.0])})
    proposed = replace(before, round_num=1, shared={**before.shared, X: torch.tensor([2.0, 2.0])})
    after = apply_server_optimizer(rule(name), before, proposed, [Part.A])
    assert float(after.shared["b:layer"]) == 5.0
    assert float(after.extra["momentum/b:layer"]) == 3.0
    assert float(after.shared[X][1]) == 2.0
    assert before.shared[X].tolist() == [1.0, 2.0]
    assert proposed.shared[X].tolist() == [2.0, 2.0]
    assert set(before.extra) == {"momentum/b:layer"}


def test_low_precision_factors_keep_their_dtype_and_have_wide_moments() -> None:
    before = ServerState(0, {X: torch.tensor([1.0], dtype=torch.bfloat16)}, {})
    proposed = ServerState(1, {X: torch.tensor([2.0], dtype=torch.bfloat16)}, {})
    after = apply_server_optimizer(rule("fedadam"), before, proposed, [Part.A])
    assert after.shared[X].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in after.extra.values()} == {torch.float32}


@pytest.mark.parametrize("name", HAND)
def test_an_overflow_is_an_error_that_says_what_to_do(name: Name) -> None:
    before, proposed = state(3e38), replace(state(-3e38), round_num=1)
    with pytest.raises(RunError, match=rf"round 1: factor 'a:layer' .* {name}; lower rounds.server_learning_rate"):
        apply_server_optimizer(rule(name, rate=1e30), before, proposed, [Part.A])


def test_fedavgm_without_momentum_at_rate_one_is_the_plain_average() -> None:
    plain = run_all(tiny_federation()).states[-1].server.shared
    with_it = run_all(tiny_federation(rounds=replace(ROUNDS, server_optimizer=rule("fedavgm", 1.0, 0.0)))).states[-1]
    for name, tensor in with_it.server.shared.items():
        assert torch.allclose(tensor, plain[name], rtol=1e-5, atol=1e-6)
    momentum = run_all(tiny_federation(rounds=replace(ROUNDS, server_optimizer=rule("fedavgm", 1.0, 0.9)))).states[-1]
    assert any(not torch.allclose(momentum.server.shared[name], plain[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("name", HAND)
def test_a_federation_moves_by_the_rule(name: Name) -> None:
    optimizer = rule(name, 0.3)
    federation = tiny_federation(method="fedit", rounds=replace(ROUNDS, server_optimizer=optimizer, num_rounds=1))
    plain = tiny_federation(method="fedit", rounds=replace(ROUNDS, num_rounds=1))
    [start, end], proposed = run_all(federation).states, run_all(plain).states[-1].server
    for factor, tensor in end.server.shared.items():
        change = (proposed.shared[factor] - start.server.shared[factor]).double()
        second = {"fedavgm": None, "fedadam": 0.0075 + 0.25 * change**2}.get(
            name, 0.01 - 0.25 * change**2 * torch.sign(0.01 - change**2)
        )
        step = change if second is None else 0.5 * change / (second.sqrt() + 0.1)
        assert torch.allclose(tensor.double(), start.server.shared[factor].double() + 0.3 * step, atol=1e-6)


def test_the_factor_that_stands_still_does_not_drift() -> None:
    federation = tiny_federation(
        method="rolora", rounds=replace(ROUNDS, server_optimizer=rule("fedadam"), num_rounds=4)
    )
    states = run_all(federation).states
    for before, after in pairwise(states):
        trained = Part.B if after.server.round_num % 2 else Part.A
        for factor, tensor in after.server.shared.items():
            assert tensor.equal(before.server.shared[factor]) == (part_of(factor) is not trained)
        for key, moment in after.server.extra.items():
            if key in before.server.extra and part_of(key.split("/", 1)[1]) is not trained:
                assert moment.equal(before.server.extra[key])


@pytest.mark.parametrize("name", HAND)
def test_moments_survive_a_checkpoint_and_a_resumed_run_has_the_same_bits(name: Name, tmp_path: Path) -> None:
    federation = tiny_federation(rounds=replace(ROUNDS, server_optimizer=rule(name), num_rounds=3))
    states = run_all(federation).states
    writer = CheckpointWriter(Checkpoints(tmp_path))
    writer.save(Checkpoint(states[1], PROGRESS), changed=tuple(states[1].personal), best_round=None)
    loaded = Checkpoints(tmp_path).load(1).state
    assert loaded.server.extra.keys() == states[1].server.extra.keys()
    assert all(tensor.equal(states[1].server.extra[key]) for key, tensor in loaded.server.extra.items())
    *_, last = (event for event in run_rounds(federation, loaded) if isinstance(event, RoundFinished))
    for kind in ("shared", "extra"):
        gone_on, whole = getattr(last.state.server, kind), getattr(states[-1].server, kind)
        assert gone_on.keys() == whole.keys()
        assert all(gone_on[key].equal(whole[key]) for key in whole)
