"""Rounds in which every client has a rank of its own: what it starts from, sends, keeps and serves, and the metrics."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch

from contract.numpy_oracle import mean_of_rows
from federation.capturing import Capturing, captured, equal
from federation.peft_oracle import Example, batch_nll, wrap
from sfedlora.federation.round import RoundFinished, run_rounds
from sfedlora.federation.state import Federation, initial_state, serving_adapter
from sfedlora.types import LoraSize, LoraSizes, Part, Tensors, factor_name, part_of, select_parts
from support.tiny_federation import CAUSAL_TARGETS, PAD, ROUNDS, Ran, run_all, tiny_federation
from support.tiny_models import tiny_llama

RANKS = {"a": 4, "b": 1, "c": 2, "d": 3}
EXAMPLES = {"a": 9, "b": 14, "c": 6, "d": 11}
COUNT = 40**2 / (9**2 + 14**2 + 6**2 + 11**2)
"""Effective clients of the four draws that A is the mean of."""
METHODS = ["fedsa", "flora", "flexlora", "hetlora", "local"]
THREE = replace(ROUNDS, num_rounds=3, cohort_size=3)
A_PER_RANK, B_PER_RANK = 4 * (24 + 24 + 40) * 2, 4 * (24 + 12 + 24) * 2
"""Bytes of one rank of every A and every B: q, v, down in 2 layers; v has 12 outputs."""


def federation_of(method: str) -> Federation:
    """Gamma is 8 sqrt(N / r) with the effective count; flora and flexlora, which average no A, have 8 / r."""
    counts = method not in {"flora", "flexlora"}
    rule, init = ("sfed", "independent") if counts else ("lora", "shared")
    federation = tiny_federation(method=method, init=init, rule=rule, rounds=THREE)  # type: ignore[arg-type]
    sizes = {client: LoraSize(rank, gamma_of(method, rank)) for client, rank in RANKS.items()}
    return replace(federation, sizes=LoraSizes(sizes["a"], sizes))


def gamma_of(method: str, rank: int) -> float:
    return 8 / rank if method in {"flora", "flexlora"} else 8 * (COUNT / rank) ** 0.5


def first(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """The first rows of A and columns of B."""
    return {name: t[:rank] if part_of(name) is Part.A else t[:, :rank] for name, t in tensors.items()}


Run = tuple[Federation, Ran, Capturing]
on_factors = pytest.mark.parametrize("run", [name for name in METHODS if name != "flora"], indirect=True)
"""Where all that a client gets are factors: flora starts anew, on a corrected base (`test_base_deltas`)."""


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest) -> Run:
    federation = federation_of(request.param)
    return federation, *captured(federation)


def test_everybody_trains_at_its_own_rank_and_gamma(run: Run) -> None:
    federation, ran, runner = run
    assert {work.client_id for work in runner.work} == set(RANKS)
    for work, outcome in zip(runner.work, runner.outcomes, strict=True):
        rank = RANKS[work.client_id]
        assert work.size.rank == rank
        assert work.size.scaling == pytest.approx(gamma_of(federation.method.name, rank))
        shapes = federation.resident.layout.shapes(rank)
        assert {name: tuple(tensor.shape) for name, tensor in work.start.items()} == shapes
        assert {name: tuple(tensor.shape) for name, tensor in outcome.tensors.items()} == shapes
    whole = federation.resident.layout.shapes(4)
    for state in ran.states:
        assert all(tuple(tensor.shape) == whole[name] for name, tensor in state.server.shared.items())
        for client, own in state.personal.items():
            shapes = federation.resident.layout.shapes(RANKS[client])
            assert all(tuple(tensor.shape) == shapes[name] for name, tensor in own.items())


@on_factors
def test_everybody_starts_from_its_cut_of_the_shared_factors(run: Run) -> None:
    federation, ran, runner = run
    method = federation.method
    for work in runner.work:
        before = ran.states[work.round_num - 1]
        cut = first(before.server.shared, RANKS[work.client_id])
        if method.name == "flexlora":  # the product keeps its size: s_i B_i A_i is the server's product, cut
            ratio = federation.sizes.server.scaling / gamma_of("flexlora", RANKS[work.client_id])
            cut = {name: t * ratio if part_of(name) is Part.B else t for name, t in cut.items()}
        assert all(torch.equal(work.start[name], tensor) for name, tensor in cut.items())
        own = before.personal.get(work.client_id)
        kept = select_parts(work.start, method.personal_parts())
        assert equal(kept, own) if own is not None else all(not b.any() for b in select_parts(kept, [Part.B]).values())


def test_gammas_gain_and_bytes_of_a_line_by_hand(run: Run) -> None:
    federation, ran, runner = run
    name = federation.method.name
    shared = {"fedsa": A_PER_RANK, "local": 0}.get(name, A_PER_RANK + B_PER_RANK)
    for record in ran.records:
        assert list(record["scaling"]) == ["a", "b", "c", "d"]
        assert record["scaling"] == pytest.approx({client: gamma_of(name, rank) for client, rank in RANKS.items()})
        ranks = [RANKS[client] for client in record["cohort"]]
        assert record["bytes_up"] == shared * sum(ranks)
        if name != "flora":
            assert record["bytes_down"] == shared * sum(ranks)
        starts = [work for work in runner.work if work.round_num == record["round_num"]]
        squares = [
            record["scaling"][work.client_id] ** 2 * float(tensor.double().square().sum()) / tensor.shape[1]
            for work in starts
            for factor, tensor in work.start.items()
            if part_of(factor) is Part.A
        ]
        assert record["gain"] == pytest.approx(fmean(squares), rel=1e-5)


@on_factors
def test_everybody_is_evaluated_with_its_own_rank_and_gamma_by_stock_peft(
    run: Run,
) -> None:
    federation, ran, _ = run
    name, data = federation.method.name, federation.data
    assert data.label_starts is not None
    for client, rank in RANKS.items():
        adapter = {**first({**federation.initial, **ran.states[-1].server.shared}, rank)}
        if name == "flexlora":
            ratio = federation.sizes.server.scaling / gamma_of(name, rank)
            adapter = {key: t * ratio if part_of(key) is Part.B else t for key, t in adapter.items()}
        adapter |= ran.states[-1].personal.get(client, {})
        model = wrap(tiny_llama(), CAUSAL_TARGETS, rank=rank, scaling=gamma_of(name, rank), start=adapter)
        chosen = [
            Example(data.example_tokens(i).tolist(), int(data.label_starts[i]))
            for i in federation.splits[client].validation
        ]
        with torch.no_grad():
            total, count = batch_nll(model, chosen, classify=False, pad=PAD)
        assert ran.records[-1]["clients"][client]["eval_loss"] == pytest.approx(float(total) / count, rel=1e-5)


def test_rows_of_a_are_means_over_those_that_trained_them() -> None:
    federation = federation_of("fedsa")
    ran, runner = captured(federation)
    for number in (1, 2, 3):
        sent = {o.client_id: o.tensors for o in runner.outcomes if o.round_num == number}
        total = sum(EXAMPLES[client] for client in sent)
        p = {client: EXAMPLES[client] / total for client in sent}
        for target in federation.resident.layout.targets:
            name = factor_name(Part.A, target.path)
            values = {client: tensors[name].double().numpy() for client, tensors in sent.items()}
            before = ran.states[number - 1].server.shared[name].double().numpy()
            after = ran.states[number].server.shared[name].double().numpy()
            np.testing.assert_allclose(after, mean_of_rows(values, p, before), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_before_it_takes_part_a_client_serves_its_cut_of_the_initial_adapter(method: str) -> None:
    federation = federation_of(method)
    state = initial_state(federation)
    for client, rank in RANKS.items():
        served = serving_adapter(federation, state, client)
        assert {name: tuple(t.shape) for name, t in served.items()} == federation.resident.layout.shapes(rank)
        assert all(not b.any() for b in select_parts(served, [Part.B]).values())
        cut = first(select_parts(federation.initial, [Part.A]), rank)
        assert equal(select_parts(served, [Part.A]), cut) == (method != "local")  # local keeps draws of its own
    if method == "local":
        a, b = (select_parts(serving_adapter(federation, state, client), [Part.A]) for client in ("a", "b"))
        assert not any(b[name].equal(a[name][:1]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_state_gives_the_bits_of_an_uninterrupted_run(method: str) -> None:
    whole = run_all(federation_of(method))
    later = [event for event in run_rounds(federation_of(method), whole.states[1]) if isinstance(event, RoundFinished)]
    assert equal(later[-1].state.server.shared, whole.states[-1].server.shared)
    assert equal(later[-1].state.server.extra, whole.states[-1].server.extra)
    for client, own in whole.states[-1].personal.items():
        assert equal(later[-1].state.personal[client], own)
