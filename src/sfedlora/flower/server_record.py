"""A round's line of metrics.jsonl from what sites report, and the means of a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from sfedlora.federation.client import ClientOutcome, TrainMetrics
from sfedlora.federation.evaluate import EvalResult, mean_results
from sfedlora.federation.record import client_records, evaluation_record, scaling_record, training_record
from sfedlora.federation.round import SCHEMA_VERSION
from sfedlora.flower.protocol import RoundReply
from sfedlora.lora.scaling import effective_clients
from sfedlora.methods import client_weights
from sfedlora.setup.server import PreparedServer
from sfedlora.types import Update

__all__ = ["describe", "evaluated_record", "evaluation_results", "means_by_split", "trained_record"]

Split = Literal["validation", "test"]
_TRAINING = ("train_loss", "grad_norm_a", "grad_norm_b", "tokens", "padded_tokens")


def trained_record(  # noqa: PLR0917 - what a round consists of
    server: PreparedServer,
    round_num: int,
    cohort: Sequence[str],
    updates: Sequence[Update],
    replies: Mapping[str, RoundReply],
    excluded: Mapping[str, str],
) -> dict[str, Any]:
    """The line of a round before its evaluation; null for what sites do not send (`flower.metrics`).

    Args:
        server: the server.
        round_num: the round.
        cohort: who was asked.
        updates: those that were used.
        replies: client id -> reply.
        excluded: client id -> why its update was not used.
    """
    config, sizes = server.config, server.rules.sizes
    outcomes = {update.client_id: _outcome(update, replies[update.client_id]) for update in updates}
    measured = {client_id: outcome for client_id, outcome in outcomes.items() if outcome is not None}
    gains = [one.gain for key in measured if (one := replies[key].measured) and one.gain is not None]
    weights = client_weights({one.client_id: one.num_examples for one in updates}, config.rounds.weighting)
    clients: dict[str, Any] = {update.client_id: {"num_examples": update.num_examples} for update in updates}
    if config.flower.metrics == "per-client":
        clients = client_records(measured, {}, {})
    return {
        "schema_version": SCHEMA_VERSION,
        "round_num": round_num,
        "cohort": list(cohort),
        **(training_record(measured) if measured else dict.fromkeys(_TRAINING)),
        "gain": fmean(gains) if gains else None,
        "scaling": scaling_record(sizes, list(cohort)),
        "effective_clients": server.formed.effective_clients,
        "effective_cohort_size": effective_clients(list(weights.values())),
        "clients_per_batch": 1,
        "eval_seconds": None,
        "excluded": dict(sorted(excluded.items())),
        "clients": clients,
    }


def evaluated_record(
    server: PreparedServer,
    trained: Mapping[str, Any],
    results: Mapping[str, EvalResult],
    num_examples: Mapping[str, int],
) -> dict[str, Any]:
    """The complete line of a round."""
    clients = {client_id: dict(one) for client_id, one in trained["clients"].items()}
    if server.config.flower.metrics == "per-client":
        for client_id, result in results.items():
            own = clients.setdefault(client_id, {"num_examples": num_examples[client_id]})
            own |= {"num_evaluated": result.num_examples, **result.metrics()}
    means = evaluation_record(results, server.config.model.task)
    return {**trained, **means, "clients": dict(sorted(clients.items()))}


def evaluation_results(replies: Mapping[str, RoundReply], split: Split) -> dict[str, EvalResult]:
    """Client id -> metrics on a split, of the replies that have them; in client-id order."""
    results = {}
    for client_id in sorted(replies):
        one = replies[client_id].evaluated.get(split)
        if one is not None and one.num_examples:
            loss = math.nan if one.loss is None else one.loss
            results[client_id] = EvalResult(one.num_examples, loss, one.accuracy, one.macro_f1)
    return results


def means_by_split(
    server: PreparedServer, results: Mapping[Split, Mapping[str, EvalResult]]
) -> dict[str, dict[str, Any]]:
    """Split -> weighted and unweighted means over sites, and what each measured if that may be recorded."""
    means: dict[str, dict[str, Any]] = {
        split: {"weighted": mean_results(own, weighted=True), "unweighted": mean_results(own, weighted=False)}
        for split, own in results.items()
    }
    if server.config.flower.metrics == "per-client":
        for split, own in results.items():
            means[split]["clients"] = {client_id: result.metrics() for client_id, result in own.items()}
    return means


def describe(record: Mapping[str, Any], num_rounds: int) -> str:
    """A finished round in one line of text."""
    num_used = len(record["cohort"]) - len(record["excluded"])
    parts = [f"{num_used} of {len(record['cohort'])} sites"]
    if record["train_loss"] is not None:
        parts.append(f"train loss {record['train_loss']:.4f}")
    if record["excluded"]:
        parts.append(f"excluded {', '.join(record['excluded'])}")
    return f"round {record['round_num']}/{num_rounds}: {', '.join(parts)}"


def _outcome(update: Update, reply: RoundReply) -> ClientOutcome | None:
    """What a site measured, as the local runner gives it."""
    one = reply.measured
    if one is None or one.train_loss is None:
        return None
    metrics = TrainMetrics(
        one.train_loss, one.grad_norm_a, one.grad_norm_b, one.tokens, one.padded_tokens, one.num_steps
    )
    return ClientOutcome(update.client_id, update.round_num, update.num_examples, {}, {}, metrics)
