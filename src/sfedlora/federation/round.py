"""The round loop: cohort, broadcast, local training, server step, evaluation, record.

`run_rounds` is a generator of events. Whoever drives it shows progress, stores results, and stops between two clients
by not asking for the next event; nothing in here calls back.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork
from sfedlora.federation.eval_work import EvalWork, Split, evaluate_work, external_works, split_works
from sfedlora.federation.evaluate import EvalResult, mean_results
from sfedlora.federation.record import (
    client_records,
    evaluation_record,
    example_privacy_record,
    privacy_record,
    scaling_record,
    training_record,
)
from sfedlora.federation.runners.workers import WorkersRunner
from sfedlora.federation.sampling import choose_evaluated, most_rounds, sample_cohort
from sfedlora.federation.schedule import learning_rate_at
from sfedlora.federation.server_step import accept_updates, server_step_with_record
from sfedlora.federation.spool import Spool, num_bytes, select_lazily
from sfedlora.federation.state import (
    Federation,
    FederationState,
    RoundSettings,
    server_rules,
    starting_adapter,
    with_clients,
)
from sfedlora.lora.base_delta import select_deltas
from sfedlora.lora.scaling import effective_clients
from sfedlora.methods import broadcast_tensors, client_weights
from sfedlora.privacy.mechanism import noise_key, privatized
from sfedlora.privacy.noise import derive_key
from sfedlora.types import Part, ServerState, Tensors, Update, part_of

__all__ = [
    "SCHEMA_VERSION",
    "ClientEvaluated",
    "ClientTrained",
    "RoundFinished",
    "RoundStarted",
    "Split",
    "evaluate_clients",
    "evaluate_external",
    "gain_of",
    "make_work",
    "num_bytes",
    "protection_record",
    "run_round",
    "run_rounds",
    "with_outcomes",
]

SCHEMA_VERSION = 1
SPOOLED_ABOVE = 2**28
"""Bytes; where a cohort of clients each with as large an outcome as one has would exceed this, that one is spooled."""


@dataclass(frozen=True)
class RoundStarted:
    """A round begins."""

    round_num: int
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class ClientTrained:
    """One client of the cohort has finished, well (`outcome`) or not (`error`)."""

    round_num: int
    client_id: str
    outcome: ClientOutcome | None
    error: ClientError | None


@dataclass(frozen=True)
class ClientEvaluated:
    """One client has been evaluated."""

    round_num: int
    client_id: str
    num_evaluated: int


@dataclass(frozen=True)
class RoundFinished:
    """A round is complete: the state after it and its line of metrics.jsonl."""

    state: FederationState
    record: Mapping[str, Any]


Event = RoundStarted | ClientTrained | ClientEvaluated | RoundFinished


def run_rounds(
    federation: Federation,
    state: FederationState,
    finished: Mapping[str, ClientOutcome] | None = None,
    spool: Spool | None = None,
) -> Iterator[Event]:
    """Run the rounds after `state` to the last one.

    Args:
        federation: what stays the same.
        state: the state to go on from.
        finished: outcomes of clients that had already finished the next round when it was interrupted.
        spool: where the outcomes of a large cohort wait, and then its clients in the state after the round, so it must
            stay open as long as states are used; None keeps all in memory.

    Raises:
        RunError: every client of a cohort failed.
        StorageError: the spool's disk is full.
    """
    done = dict(finished or {})
    while state.server.round_num < federation.rounds.num_rounds:
        state = yield from run_round(federation, state, done, spool)
        done = {}


def run_round(
    federation: Federation, state: FederationState, done: Mapping[str, ClientOutcome], spool: Spool | None = None
) -> Generator[Event, None, FederationState]:
    """Run the round after `state`; as `run_rounds`. Returns the state after it."""
    round_num = state.server.round_num + 1
    settings = federation.rounds
    cohort = sample_cohort(
        list(federation.participants), settings.cohort_size, seed=federation.seed, round_num=round_num
    )
    yield RoundStarted(round_num, cohort)
    gains: list[float] = []
    clock = time.perf_counter()
    outcomes: dict[str, ClientOutcome] = {}
    excluded: dict[str, str] = {}
    members = {client_id: federation.participants[client_id] for client_id in cohort}
    waiting = federation.runner.order(members, done)
    for client_id in sorted(done.keys() - set(waiting)):
        gains.append(gain_of(starting_adapter(federation, state, client_id), federation.sizes.of(client_id).scaling))
        outcomes[client_id] = _spooled(spool, done[client_id], len(cohort))
        yield ClientTrained(round_num, client_id, outcomes[client_id], None)
    for result in federation.runner.run_cohort(_work_of(federation, state, waiting, gains)):
        if isinstance(result, ClientError):
            excluded[result.client_id] = result.reason
            yield ClientTrained(round_num, result.client_id, None, result)
        else:
            outcomes[result.client_id] = _spooled(spool, result, len(cohort))
            yield ClientTrained(round_num, result.client_id, outcomes[result.client_id], None)
    train_seconds = time.perf_counter() - clock

    clock = time.perf_counter()
    before = state.server
    state, updates, step_record = _server_step(federation, state, outcomes, excluded)
    aggregate_seconds = time.perf_counter() - clock

    clock = time.perf_counter()
    evaluated: dict[str, EvalResult] = {}
    if round_num % settings.evaluate_every == 0 or round_num == settings.num_rounds:
        for client_id, count, evaluation in evaluate_clients(federation, state, "validation", cohort):
            evaluated[client_id] = evaluation
            yield ClientEvaluated(round_num, client_id, count)
    external = evaluate_external(federation, state, list(evaluated), "validation")
    eval_seconds = time.perf_counter() - clock

    seconds = {"train_seconds": train_seconds, "aggregate_seconds": aggregate_seconds, "eval_seconds": eval_seconds}
    record = {
        "schema_version": SCHEMA_VERSION,
        "round_num": round_num,
        "cohort": list(cohort),
        **training_record(outcomes),
        **evaluation_record(evaluated, federation.task),
        **external,
        "gain": fmean(gains),
        "scaling": scaling_record(federation.sizes, [*{*cohort, *evaluated}]),
        "effective_clients": federation.effective_clients,
        **_traffic_record(federation, before, updates, cohort),
        **step_record,
        "clients_per_batch": federation.runner.clients_per_batch,
        **seconds,
        "excluded": dict(sorted(excluded.items())),
        "clients": client_records(outcomes, evaluated, {key: len(federation.splits[key].train) for key in evaluated}),
    }
    yield RoundFinished(state, record)
    return state


def evaluate_clients(
    federation: Federation, state: FederationState, split: Split, cohort: Sequence[str]
) -> Iterator[tuple[str, int, EvalResult]]:
    """Evaluate each chosen client on a split of its own data with the adapter it serves now.

    Clients share forward passes where they serve one model, or where the runner stacks adapters.

    Yields:
        Client id, number of clients that are evaluated, result; in client-id order.
    """
    chosen = choose_evaluated(list(federation.splits), federation.rounds.evaluated, cohort, seed=federation.seed)
    for work, results in _evaluate(federation, split_works(federation, state, split, chosen)):
        for client_id, result in zip(work.client_ids, results, strict=True):
            yield client_id, len(chosen), result


def evaluate_external(
    federation: Federation, state: FederationState, client_ids: Sequence[str], split: Split
) -> dict[str, Any]:
    """Mean metrics of the evaluated clients on the extra file of a split, as `external_<split>`; empty without one."""
    if split not in federation.external or not client_ids:
        return {}
    works = external_works(federation, state, split, client_ids)
    evaluated = {work.client_ids[0]: result for work, [result] in _evaluate(federation, works)}
    return {f"external_{split}": mean_results(evaluated, weighted=False)}


def _evaluate(federation: Federation, works: Iterator[EvalWork]) -> Iterator[tuple[EvalWork, list[EvalResult]]]:
    """Every piece of an evaluation with its results, in order; on the runner's workers where some run."""
    if isinstance(federation.runner, WorkersRunner) and federation.runner.is_running:
        return federation.runner.evaluate(works)
    return ((work, evaluate_work(federation, work)) for work in works)


def _work_of(
    federation: Federation, state: FederationState, client_ids: Sequence[str], gains: list[float]
) -> Iterator[ClientWork]:
    """The work of each client, made when the runner asks for it; notes the gain it starts with."""
    for client_id in client_ids:
        work = make_work(federation, state, client_id)
        gains.append(gain_of(work.start, work.size.scaling))
        yield work


def _spooled(spool: Spool | None, outcome: ClientOutcome, cohort_size: int) -> ClientOutcome:
    """The outcome with its tensors in the spool if a cohort of its like is too large for memory."""
    size = num_bytes(outcome.tensors) + num_bytes(outcome.optimizer_state)
    if spool is None or size * cohort_size <= SPOOLED_ABOVE:
        return outcome
    key = f"round {outcome.round_num}, {outcome.client_id}"  # its file may be wanted until the next round is stored
    moments = outcome.optimizer_state
    return replace(
        outcome,
        tensors=spool.put(key, outcome.tensors),
        optimizer_state=spool.put(f"moments, {key}", moments) if moments else moments,
    )


def make_work(federation: Federation, state: FederationState, client_id: str) -> ClientWork:
    """What a client is to do in the round after `state`."""
    round_num = state.server.round_num + 1
    settings = federation.rounds
    return ClientWork(
        client_id=client_id,
        round_num=round_num,
        start=starting_adapter(federation, state, client_id),
        trained=federation.method.trained_parts(round_num),
        size=federation.sizes.of(client_id),
        learning_rate=learning_rate_at(
            round_num,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup_rounds=settings.warmup_rounds,
            num_rounds=settings.num_rounds,
        ),
        indices=federation.participants[client_id],
        optimizer_state=state.optimizer.get(client_id, {}),
        anchored=federation.method.shared_parts(round_num),
        base_deltas=select_deltas(state.server.extra),
        noise_key=_training_key(federation, state, client_id),
    )


def _training_key(federation: Federation, state: FederationState, client_id: str) -> bytes:
    """The key of a client's noise on gradients in the round after `state`; empty without example-level privacy."""
    privacy = federation.rounds.example_privacy
    if privacy is None:
        return b""
    return derive_key(noise_key(privacy, state.server), "training", client_id, state.server.round_num + 1)


def _server_step(
    federation: Federation, state: FederationState, outcomes: dict[str, ClientOutcome], excluded: dict[str, str]
) -> tuple[FederationState, list[Update], dict[str, Any]]:
    """Aggregate what arrived; a refused update is excluded with its reason and changes nothing at its client.

    Returns:
        The state after the round, the accepted updates, and what the round's record says of the step.
    """
    round_num, rules = state.server.round_num + 1, server_rules(federation)
    shared = rules.method.shared_parts(round_num)
    norms: list[float] = []
    replies = (
        Update(client_id, round_num, outcome.num_examples, _sent(federation, state, outcome, shared, norms))
        for client_id, outcome in sorted(outcomes.items())
    )
    updates, refused = accept_updates(rules, state.server, replies)
    excluded |= refused
    for client_id in refused:
        del outcomes[client_id]
    server, step_record = server_step_with_record(rules, state.server, updates, excluded)
    record = protection_record(
        federation.rounds,
        step_record,
        client_ids=list(federation.participants),
        seed=federation.seed,
        round_num=round_num,
        norms=norms,
    )
    return with_outcomes(federation, replace(state, server=server), outcomes), updates, record


def protection_record(
    settings: RoundSettings,
    step_record: Mapping[str, Any],
    *,
    client_ids: Sequence[str],
    seed: int,
    round_num: int,
    norms: Sequence[float] = (),
) -> dict[str, Any]:
    """What a round's line says of robust rules and privacy.

    Args:
        settings: how rounds are run.
        step_record: what the server step says of itself.
        client_ids: all clients, among whom cohorts are drawn.
        seed: of the run.
        round_num: the round.
        norms: of the changes that clients clipped themselves, where they are known.
    """
    record = dict(step_record)
    if "robust_selected" in record:
        record["effective_cohort_size"] = float(len(record["robust_selected"]))
    if settings.privacy is None and settings.example_privacy is None:
        return record
    clip_fraction = record.pop("clip_fraction", None)
    if settings.privacy is not None and norms:
        clip_fraction = settings.privacy.clip_fraction(norms)
    most = most_rounds(client_ids, settings.cohort_size, seed=seed, num_rounds=round_num)
    spent = privacy_record(settings.privacy, num_rounds=round_num, most_rounds=most, clip_fraction=clip_fraction)
    return record | spent | example_privacy_record(settings.example_privacy, num_steps=most * settings.most_uses)


def _sent(
    federation: Federation,
    state: FederationState,
    outcome: ClientOutcome,
    shared: frozenset[Part],
    norms: list[float],
) -> Tensors:
    """The factors that a client sends; under local privacy with its noise, and the norm of its change is noted."""
    tensors, privacy = select_lazily(outcome.tensors, shared), federation.rounds.privacy
    if privacy is None or privacy.mode == "central":
        return tensors
    start = starting_adapter(federation, state, outcome.client_id)
    key = derive_key(noise_key(privacy, state.server), "client", outcome.client_id)
    release = privatized(privacy, start, tensors, round_num=outcome.round_num, key=key)
    norms += release.norms
    return release.tensors


def with_outcomes(
    federation: Federation, state: FederationState, outcomes: Mapping[str, ClientOutcome]
) -> FederationState:
    """Every client of the round keeps its personal factors, and its moments where they are kept."""
    parts = federation.method.personal_parts()
    personal: dict[str, Tensors] = {}
    moments: dict[str, Tensors] = {}
    for client_id in sorted(outcomes):
        outcome = outcomes[client_id]
        untrained = parts - federation.method.trained_parts(outcome.round_num)
        before = state.personal.get(client_id, {}) if untrained else {}
        own = select_lazily(outcome.tensors, parts)
        personal[client_id] = {**before, **own} if before else own
        if outcome.optimizer_state:
            moments[client_id] = outcome.optimizer_state
    return replace(
        state,
        personal=with_clients(state.personal, personal),
        optimizer=with_clients(state.optimizer, moments),
    )


def gain_of(adapter: Tensors, scaling: float) -> float:
    """gamma^2 ||A||_F^2 / in_features, mean over layers."""
    return fmean(
        scaling**2 * float(torch.linalg.vector_norm(tensor)) ** 2 / tensor.shape[1]
        for name, tensor in adapter.items()
        if part_of(name) is Part.A
    )


def _traffic_record(
    federation: Federation, before: ServerState, updates: Sequence[Update], cohort: Sequence[str]
) -> dict[str, Any]:
    """Weights and bytes of the round after `before`."""
    robust = federation.rounds.robust
    weighting = "uniform" if robust is not None else federation.rounds.weighting
    weights = client_weights({item.client_id: item.num_examples for item in updates}, weighting)
    return {
        "effective_cohort_size": effective_clients(list(weights.values())),
        "bytes_up": sum(num_bytes(update.tensors) for update in updates),
        "bytes_down": _bytes_down(federation, before, cohort),
    }


def _bytes_down(federation: Federation, before: ServerState, cohort: Sequence[str]) -> int:
    """Bytes of the round's broadcasts, one for each client of the cohort, whether it replied or not."""
    method, sizes, round_num = federation.method, federation.sizes, before.round_num + 1
    current = cohort
    if round_num > 1:
        settings = federation.rounds
        everybody = list(federation.participants)
        current = sample_cohort(everybody, settings.cohort_size, seed=federation.seed, round_num=round_num - 1)
    total = 0
    for client_id in cohort:
        is_current, size = client_id in current, sizes.of(client_id)
        total += num_bytes(broadcast_tensors(method, before, is_current=is_current, server=sizes.server, client=size))
    return total
