"""The parts of a line of metrics.jsonl that are means over clients. DESIGN's key names; SI units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sfedlora.federation.client import ClientOutcome
from sfedlora.federation.evaluate import EvalResult, mean_results
from sfedlora.federation.objective import Task
from sfedlora.privacy.accounting import epsilon_after, epsilon_of_rounds, epsilon_of_steps
from sfedlora.privacy.examples import ExamplePrivacy
from sfedlora.privacy.mechanism import Privacy
from sfedlora.types import LoraSizes

__all__ = [
    "client_records",
    "evaluation_record",
    "example_privacy_record",
    "privacy_record",
    "scaling_record",
    "training_record",
]


def training_record(outcomes: Mapping[str, ClientOutcome]) -> dict[str, Any]:
    """Training loss weighted by examples, gradient norms as plain means over the cohort, tokens as sums."""
    ordered = [outcomes[client_id] for client_id in sorted(outcomes)]
    examples = sum(outcome.num_examples for outcome in ordered)
    metrics = [outcome.metrics for outcome in ordered]
    return {
        "train_loss": sum(o.num_examples * o.metrics.train_loss for o in ordered) / examples,
        "grad_norm_a": _mean_known([item.grad_norm_a for item in metrics]),
        "grad_norm_b": _mean_known([item.grad_norm_b for item in metrics]),
        "tokens": sum(item.tokens for item in metrics),
        "padded_tokens": sum(item.padded_tokens for item in metrics),
    }


def evaluation_record(evaluated: Mapping[str, EvalResult], task: Task) -> dict[str, Any]:
    """Means over the evaluated clients; null in a round without evaluation."""
    if not evaluated:
        names = ["eval_loss", *(["perplexity"] if task == "causal-lm" else ["accuracy", "macro_f1"])]
        return dict.fromkeys([*names, *(f"{name}_unweighted" for name in names)])
    unweighted = mean_results(evaluated, weighted=False)
    return mean_results(evaluated, weighted=True) | {f"{name}_unweighted": value for name, value in unweighted.items()}


def client_records(
    outcomes: Mapping[str, ClientOutcome], evaluated: Mapping[str, EvalResult], num_examples: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """One entry per client that trained or was evaluated; `num_examples` counts its training examples."""
    records: dict[str, dict[str, Any]] = {}
    for client_id in sorted(outcomes.keys() | evaluated.keys()):
        trained_on = outcomes[client_id].num_examples if client_id in outcomes else num_examples[client_id]
        records[client_id] = {"num_examples": trained_on}
        if client_id in outcomes:
            outcome = outcomes[client_id]
            records[client_id] |= {
                "train_loss": outcome.metrics.train_loss,
                "num_steps": outcome.metrics.num_steps,
                "grad_norm_a": outcome.metrics.grad_norm_a,
                "grad_norm_b": outcome.metrics.grad_norm_b,
            }
        if client_id in evaluated:
            result = evaluated[client_id]
            records[client_id] |= {"num_evaluated": result.num_examples, **result.metrics()}
    return records


def scaling_record(sizes: LoraSizes, client_ids: Sequence[str]) -> float | dict[str, float]:
    """Gamma as a number, or client id -> its gamma where ranks differ."""
    if not sizes.clients:
        return sizes.server.scaling
    return {client_id: sizes.of(client_id).scaling for client_id in sorted(client_ids)}


def privacy_record(
    privacy: Privacy | None, *, num_rounds: int, most_rounds: int, clip_fraction: float | None
) -> dict[str, Any]:
    """What a run has spent after some rounds, as `privacy`; empty without privacy.

    Args:
        privacy: its settings.
        num_rounds: rounds up to now.
        most_rounds: of these, in how many the client that was drawn most often was.
        clip_fraction: the share of clients whose change was clipped; None where it is not known (sites that clip
            themselves tell nobody).
    """
    if privacy is None:
        return {}
    known = epsilon_of_rounds(privacy, most_rounds)
    return {
        "privacy": {
            "mode": privacy.mode,
            "delta": privacy.delta,
            "epsilon": epsilon_after(privacy, num_rounds) if privacy.mode == "central" else known,
            "epsilon_cohorts_known": known,
            "noise_std": privacy.noise_std,
            "clip_fraction": clip_fraction,
        }
    }


def example_privacy_record(privacy: ExamplePrivacy | None, *, num_steps: int) -> dict[str, Any]:
    """What an example has spent that was in so many optimizer steps, as `example_privacy`; empty without it."""
    if privacy is None:
        return {}
    return {"example_privacy": {"delta": privacy.delta, "epsilon": epsilon_of_steps(privacy, num_steps)}}


def _mean_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
