"""Loss and task metrics of the model as a client would serve it, and their means over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.data.batches import plan_eval_batches
from sfedlora.data.encoded import NO_EXAMPLES, EncodedData, collate, collate_groups
from sfedlora.federation.objective import BatchLoss, Task, batch_loss
from sfedlora.lora.inject import ResidentModel

__all__ = ["EvalBatching", "EvalResult", "evaluate_examples", "evaluate_stack", "mean_results"]


@dataclass(frozen=True)
class EvalBatching:
    """How evaluation examples are grouped: at most so many examples and tokens (padding included) in one forward."""

    batch_size: int
    max_tokens: int


@dataclass(frozen=True)
class EvalResult:
    """Metrics over a set of examples.

    Attributes:
        num_examples: examples evaluated.
        loss: mean over labelled tokens (causal-lm) or examples (classification), in nats.
        accuracy: share of right predictions; None for causal-lm.
        macro_f1: mean F1 over the classes that occur in labels or predictions; None for causal-lm.
    """

    num_examples: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None

    def metrics(self) -> dict[str, float]:
        """The metrics that exist for the task, by the names of metrics.jsonl."""
        named = {"eval_loss": self.loss}
        if self.accuracy is None or self.macro_f1 is None:
            return named | {"perplexity": perplexity(self.loss)}
        return named | {"accuracy": self.accuracy, "macro_f1": self.macro_f1}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


@torch.no_grad()
def evaluate_examples(
    resident: ResidentModel,
    data: EncodedData,
    groups: Sequence[Sequence[int]],
    *,
    task: Task,
    batching: EvalBatching,
    pad_token_id: int,
) -> list[EvalResult]:
    """Evaluate the one model that is loaded on the examples of several clients, in common batches.

    Args:
        resident: holds one adapter.
        data: all encoded examples.
        groups: positions in `data`, for each client at least one.
        task: decides the metrics.
        batching: sizes of the forward passes.
        pad_token_id: id at pad positions.

    Returns:
        One result per group.
    """
    rows = np.concatenate([np.asarray(group, dtype=np.int64) for group in groups])
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    sums = [_Sums() for _ in groups]
    places = plan_eval_batches(
        data.lengths[rows], np.arange(len(rows)), batch_size=batching.batch_size, max_tokens=batching.max_tokens
    )
    for chosen in places:
        batch = collate(data, rows[chosen], pad_token_id=pad_token_id)
        loss = batch_loss(resident.model, batch, task, resident.device)
        _add(sums, owners[chosen], data.num_label_tokens[rows[chosen]], batch.labels, loss)
    return [own.result(len(group)) for own, group in zip(sums, groups, strict=True)]


@torch.no_grad()
def evaluate_stack(
    resident: ResidentModel,
    data: EncodedData,
    groups: Sequence[Sequence[int]],
    *,
    task: Task,
    batching: EvalBatching,
    pad_token_id: int,
) -> list[EvalResult]:
    """Evaluate a stack of adapters, each on its own examples, in common forward passes; see `evaluate_examples`."""
    share = len(groups)
    plans = [
        plan_eval_batches(
            data.lengths,
            np.asarray(group, dtype=np.int64),
            batch_size=max(1, batching.batch_size // share),
            max_tokens=batching.max_tokens // share,
        )
        for group in groups
    ]
    sums = [_Sums() for _ in groups]
    for step in range(max(len(plan) for plan in plans)):
        own = [plan[step] if step < len(plan) else NO_EXAMPLES for plan in plans]
        batch = collate_groups(data, own, pad_token_id=pad_token_id)
        loss = batch_loss(resident.model, batch.joined, task, resident.device)
        num_rows = batch.padded_shape[0]
        owners = np.repeat(np.arange(share), num_rows)
        real = np.concatenate([np.arange(num_rows) < len(rows) for rows in own])
        counts = np.zeros(len(owners), dtype=np.int64)
        counts[real] = data.num_label_tokens[np.concatenate(own)]
        _add(sums, np.where(real, owners, -1), counts, batch.joined.labels, loss)
    return [own_sums.result(len(group)) for own_sums, group in zip(sums, groups, strict=True)]


@dataclass
class _Sums:
    """What is summed over one client's examples."""

    total: float = 0.0
    count: int = 0
    labels: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)

    def result(self, num_examples: int) -> EvalResult:
        if not self.predictions:
            return EvalResult(num_examples, self.total / self.count)
        accuracy, macro_f1 = _classification_metrics(torch.cat(self.labels), torch.cat(self.predictions))
        return EvalResult(num_examples, self.total / self.count, accuracy, macro_f1)


def _add(
    sums: Sequence[_Sums], owners: NDArray[np.int64], counts: NDArray[np.int64], labels: Tensor, loss: BatchLoss
) -> None:
    """Add the rows of one batch to their owners' sums; owner -1 is padding."""
    losses = loss.per_example.double().cpu().numpy()
    predictions = None if loss.predictions is None else loss.predictions.cpu()
    for owner in np.unique(owners[owners >= 0]):
        mine = owners == owner
        own = sums[owner]
        own.total += float(losses[mine].sum())
        own.count += int(counts[mine].sum())
        if predictions is not None:
            chosen = torch.from_numpy(mine)
            own.labels.append(labels[chosen])
            own.predictions.append(predictions[chosen])


def mean_results(results: Mapping[str, EvalResult], *, weighted: bool) -> dict[str, float]:
    """Mean of every metric over clients: weighted by their examples, or each client the same.

    Perplexity is exp of the mean loss, not the mean of perplexities.
    """
    weights = {key: float(result.num_examples) if weighted else 1.0 for key, result in results.items()}
    scale = sum(weights.values())
    means: dict[str, float] = {}
    for key, result in results.items():
        for name, value in result.metrics().items():
            means[name] = means.get(name, 0.0) + weights[key] / scale * value
    if "perplexity" in means:
        means["perplexity"] = perplexity(means["eval_loss"])
    return means


def _classification_metrics(labels: Tensor, predictions: Tensor) -> tuple[float, float]:
    scores = []
    for label in torch.unique(torch.cat([labels, predictions])).tolist():
        right = int(((labels == label) & (predictions == label)).sum())
        scores.append(2 * right / (int((labels == label).sum()) + int((predictions == label).sum())))
    return float((labels == predictions).double().mean()), sum(scores) / len(scores)
