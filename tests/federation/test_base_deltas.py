"""Rounds of methods that correct the frozen weights: what clients start from and train on, what travels, resuming.

The model after some rounds is judged against a plain one whose weights were summed in NumPy from what clients sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from federation.capturing import captured, equal
from sfedlora.federation.client import ClientOutcome, TrainingSetup, train_client
from sfedlora.federation.round import RoundFinished, run_rounds
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.state import Federation, load_serving
from sfedlora.lora.base_delta import select_deltas
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.methods import FedIT, Traits
from sfedlora.methods.base import HeadPlacement
from sfedlora.types import LoraSize, LoraSizes, Part, Tensors, select_parts
from support.tiny_federation import CAUSAL_TARGETS, ROUNDS, TRAINING, run_all, tiny_federation
from support.tiny_models import VOCAB_SIZE, tiny_llama

IDS = torch.randint(3, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(0))
EXAMPLES = {"a": 9, "b": 14, "c": 6, "d": 11}
RANKS = {"a": 4, "b": 1, "c": 2, "d": 3}
METHODS = ["fedex", "flora"]
FOUR = replace(ROUNDS, num_rounds=4, cohort_size=2, learning_rate=1.0)
COHORTS = [["c", "d"], ["c", "d"], ["a", "c"], ["a", "b"]]
"""What seed 0 draws: in round 2 all have the broadcast of the round before, in rounds 3 and 4 one has not."""
Dense = NDArray[np.float64]


def federation_of(method: str, *, unequal: bool = False, **settings: Any) -> Federation:
    federation = tiny_federation(method=method, init="shared", rule="lora", rounds=FOUR, **settings)
    if unequal:
        clients = {client: LoraSize(rank, 8.0 / rank) for client, rank in RANKS.items()}
        return replace(federation, sizes=LoraSizes(LoraSize(4, 2.0), clients))
    return federation


def corrections(federation: Federation, outcomes: Sequence[ClientOutcome], rounds: int) -> dict[str, Dense]:
    """Module path -> all that the base and the shared adapter are off from W0 after some rounds, by the papers."""
    base = {target.path: np.zeros((target.out_features, target.in_features)) for target in _targets(federation)}
    adapter = dict(base)
    for number in range(1, rounds + 1):
        sent = [outcome for outcome in outcomes if outcome.round_num == number]
        total = sum(EXAMPLES[outcome.client_id] for outcome in sent)
        p = [EXAMPLES[outcome.client_id] / total for outcome in sent]
        s = [federation.sizes.of(outcome.client_id).scaling for outcome in sent]
        for path, before in base.items():
            a = [outcome.tensors[f"a:{path}"].double().numpy() for outcome in sent]
            b = [outcome.tensors[f"b:{path}"].double().numpy() for outcome in sent]
            ideal = np.sum([p[k] * s[k] * b[k] @ a[k] for k in range(len(sent))], axis=0)
            if federation.method.name == "fedex":
                adapter[path] = s[0] * np.average(b, axis=0, weights=p) @ np.average(a, axis=0, weights=p)
            base[path] = before + ideal - adapter[path]
    return {path: base[path] + adapter[path] for path in base}


def _targets(federation: Federation) -> Any:
    return federation.resident.layout.targets


def plain_logits(added: Mapping[str, Dense]) -> Tensor:
    model = tiny_llama()
    with torch.no_grad():
        for path, dense in added.items():
            model.get_parameter(f"{path}.weight").add_(torch.from_numpy(dense).float())
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize(("method", "unequal"), [("fedex", False), ("flora", False), ("flora", True)])
def test_everybody_serves_the_plain_model_with_what_was_sent_added_to_its_weights(method: str, unequal: bool) -> None:
    federation = federation_of(method, unequal=unequal)
    ran, runner = captured(federation)
    assert [record["cohort"] for record in ran.records] == COHORTS
    for number in range(1, 5):
        expected = plain_logits(corrections(federation, runner.outcomes, number))
        for client in "abcd":  # in the cohort or not
            load_serving(federation, ran.states[number], [client])
            with torch.no_grad():
                logits = federation.resident.model(input_ids=IDS).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    moved = float((expected - plain_logits({})).abs().max())
    assert moved > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_clients_train_on_the_corrected_weights(method: str) -> None:
    federation = federation_of(method)
    _, runner = captured(federation)
    [work] = [work for work in runner.work if (work.round_num, work.client_id) == (3, "a")]
    merged = tiny_llama()
    with torch.no_grad():
        for target in _targets(federation):
            names = [name for name in work.base_deltas if name.endswith(f":{target.path}")]
            weight = merged.get_parameter(f"{target.path}.weight")
            weight.add_(torch.from_numpy(_dense({name: work.base_deltas[name] for name in names})).float())
    resident: ResidentModel = adapt(merged, target_modules=CAUSAL_TARGETS, rank=4)
    assert isinstance(federation.runner, SerialRunner)
    setup: TrainingSetup = replace(federation.runner.setup, resident=resident)
    on_merged = train_client(setup, replace(work, base_deltas={}))
    [outcome] = [outcome for outcome in runner.outcomes if (outcome.round_num, outcome.client_id) == (3, "a")]
    for name, tensor in outcome.tensors.items():
        torch.testing.assert_close(tensor, on_merged.tensors[name], rtol=0, atol=1e-5 * float(tensor.abs().max()))
    uncorrected = train_client(federation.runner.setup, replace(work, base_deltas={}))
    assert abs(uncorrected.metrics.train_loss - outcome.metrics.train_loss) > 1e-4
    assert outcome.metrics.train_loss == pytest.approx(on_merged.metrics.train_loss, rel=1e-5)


def _dense(pieces: Tensors) -> Dense:
    """The sum of the pieces of one module, whatever their form."""
    total: Dense = np.zeros(1)
    for name, tensor in pieces.items():
        kind, path = name.split(":")
        if kind.endswith("full"):
            total = total + tensor.double().numpy()
        elif kind.endswith("left"):
            right = pieces[f"{kind.removesuffix('left')}right:{path}"]
            total = total + tensor.double().numpy() @ right.double().numpy()
    return total


# What flora starts from


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
def test_every_round_of_flora_starts_from_a_new_a_that_all_share_and_zero_b(unequal: bool) -> None:
    federation = federation_of("flora", unequal=unequal)
    _, runner = captured(federation)
    draws: dict[tuple[int, str], Tensor] = {}
    for work in runner.work:
        assert work.size == federation.sizes.of(work.client_id)
        for name, b in select_parts(work.start, [Part.B]).items():
            assert b.shape[1] == work.size.rank
            assert not b.any(), name
        for name, a in select_parts(work.start, [Part.A]).items():
            assert a.shape[0] == work.size.rank
            longest = draws.setdefault((work.round_num, name), a)
            rows = min(len(longest), len(a))
            assert a[:rows].equal(longest[:rows])
            if len(a) > len(longest):
                draws[work.round_num, name] = a
    names = {name for _, name in draws}
    for name in names:
        first = [draws[number, name][0] for number in (1, 2, 3, 4)]
        assert not any(first[i].equal(first[j]) for i in range(4) for j in range(i))
        spread = torch.cat([draws[number, name].flatten() for number in (2, 3, 4)]).double()
        expected = 1 / (3 * draws[1, name].shape[1])
        assert float(spread.square().mean()) == pytest.approx(expected, rel=0.4)
    assert equal(select_parts(federation.initial, [Part.A]), {name: draws[1, name] for name in names}) == (
        not unequal
    )  # of rank 4, which only client a has


@dataclass(frozen=True)
class Restarting:
    """FedIT, but everybody starts every round anew."""

    name: ClassVar[str] = "restarting"
    traits: ClassVar[Traits] = Traits(exact="no", averages_a=False, restarts=True)
    trained_parts = shared_parts = FedIT.shared_parts
    broadcast_parts = FedIT.broadcast_parts
    personal_parts = FedIT.personal_parts
    server_step = FedIT.server_step
    head: HeadPlacement = "shared"


def test_whatever_b_a_method_that_restarts_leaves_clients_start_from_zero() -> None:
    federation = tiny_federation(method=Restarting(), init="shared", rule="lora", rounds=FOUR)
    ran, runner = captured(federation)
    assert all(b.any() for b in select_parts(ran.states[1].server.shared, [Part.B]).values())
    assert all(not b.any() for work in runner.work for b in select_parts(work.start, [Part.B]).values())


def test_another_seed_draws_another_a_and_the_same_seed_the_same() -> None:
    starts = []
    for seed in (0, 0, 1):
        _, runner = captured(federation_of("flora", seed=seed))
        starts.append({work.round_num: select_parts(work.start, [Part.A]) for work in runner.work})
    assert all(equal(starts[0][number], starts[1][number]) for number in (1, 2, 3, 4))
    assert not any(equal(starts[0][number], starts[2][number]) for number in (1, 2, 3, 4))


def test_after_a_round_of_flora_the_shared_b_is_zero() -> None:
    ran, _ = captured(federation_of("flora"))
    for state in ran.states:
        assert all(not b.any() for b in select_parts(state.server.shared, [Part.B]).values())


def test_the_head_of_flora_goes_on_from_round_to_round() -> None:
    federation = tiny_federation(
        method="flora", task="sequence-classification", init="shared", rule="lora", rounds=replace(ROUNDS, num_rounds=3)
    )
    ran, runner = captured(federation)
    for work in runner.work:
        before = ran.states[work.round_num - 1].server.shared
        assert equal(select_parts(work.start, [Part.HEAD]), select_parts(before, [Part.HEAD]))
    heads = [select_parts(state.server.shared, [Part.HEAD]) for state in ran.states]
    assert not any(equal(heads[i], heads[i + 1]) for i in range(3))


# What travels, in bytes by hand: rank 4, two clients, so every round adds factors of rank 8.
#
#     module   (out, in)   rank 8                 rank 16
#     q_proj   (24, 24)    8 (24 + 24) = 384      matrix: 576
#     v_proj   (12, 24)    matrix: 288            matrix: 288
#     down     (24, 40)    8 (24 + 40) = 512      matrix: 960     in each of 2 layers

ONE_ROUND, TWO_ROUNDS = 4 * 2 * (384 + 288 + 512), 4 * 2 * (576 + 288 + 960)
ADAPTER = 4 * 4 * (24 + 24 + 40 + 24 + 12 + 24) * 2


@pytest.mark.parametrize(("method", "adapter_down"), [("fedex", ADAPTER), ("flora", 0)])
def test_bytes_of_the_last_round_for_those_who_were_there_and_of_all_rounds_for_others(
    method: str, adapter_down: int
) -> None:
    ran, _ = captured(federation_of(method))
    assert [record["cohort"] for record in ran.records] == COHORTS
    assert [record["bytes_up"] for record in ran.records] == [2 * ADAPTER] * 4
    corrections_down = [
        0,
        2 * ONE_ROUND,  # c and d were there: what round 1 added
        ONE_ROUND + (ONE_ROUND + ONE_ROUND),  # c was there; a needs round 1 as well
        ONE_ROUND + (TWO_ROUNDS + ONE_ROUND),  # a was there; b needs rounds 1 and 2 as well, by now one matrix
    ]
    assert [record["bytes_down"] for record in ran.records] == [2 * adapter_down + more for more in corrections_down]


def test_bytes_of_flora_with_ranks_of_their_own() -> None:
    # Stacks of rank 2 + 3 (c, d) in rounds 1 and 2, and 4 + 2 (a, c) in round 3; 5 + 5 is where v_proj is a matrix.
    ran, _ = captured(federation_of("flora", unequal=True))
    assert [record["cohort"] for record in ran.records] == COHORTS
    per_rank = 24 + 24 + 40 + 24 + 12 + 24
    assert [record["bytes_up"] for record in ran.records] == [4 * 2 * per_rank * rank for rank in (5, 5, 6, 5)]
    of_rank = {rank: 4 * 2 * (rank * 48 + rank * 36 + rank * 64) for rank in (5, 6)}
    two_rounds = 4 * 2 * (10 * 48 + 288 + 10 * 64)
    assert [record["bytes_down"] for record in ran.records] == [
        0,
        2 * of_rank[5],
        of_rank[5] + (of_rank[5] + of_rank[5]),
        of_rank[6] + (two_rounds + of_rank[6]),
    ]


def test_a_shared_head_of_flora_goes_down_and_a_personal_one_does_not() -> None:
    head = 4 * (3 * 24 + 3)
    sizes = {}
    for placement in ("personal", "shared"):
        federation = tiny_federation(
            method="flora", head=placement, task="sequence-classification", init="shared", rule="lora"
        )
        sizes[placement] = captured(federation)[0].records[0]["bytes_down"]
    assert sizes == {"personal": 0, "shared": 4 * head}


def test_fedex_adds_nothing_where_only_one_factor_moved() -> None:
    # After one step from B = 0 no A has moved, so the means of the factors lose nothing.
    training = replace(TRAINING, local_steps=1)
    ran, _ = captured(federation_of("fedex", training=training))
    assert select_deltas(ran.states[1].server.extra) == {}
    assert select_deltas(ran.states[2].server.extra) != {}


# Going on


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_going_on_from_a_state_gives_the_bits_of_an_uninterrupted_run(method: str, stop: int) -> None:
    whole = run_all(federation_of(method, dropout=0.2))
    later = [
        event
        for event in run_rounds(federation_of(method, dropout=0.2), whole.states[stop])
        if isinstance(event, RoundFinished)
    ]
    last, expected = later[-1].state.server, whole.states[-1].server
    assert equal(last.shared, expected.shared)
    assert equal(last.extra, expected.extra)
    assert [event.record["bytes_down"] for event in later] == [r["bytes_down"] for r in whole.records[stop:]]
    assert later[-1].record["eval_loss"] == whole.records[-1]["eval_loss"]
