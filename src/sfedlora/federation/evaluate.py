"""Loss and task metrics of the model as a client would serve it, and their means over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfedlora.data.batches import plan_eval_batches
from sfedlora.data.encoded import EncodedData, collate
from sfedlora.federation.objective import Task, batch_loss
from sfedlora.lora.inject import ResidentModel

__all__ = ["EvalBatching", "EvalResult", "evaluate_examples", "mean_results"]


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
    indices: Sequence[int],
    *,
    task: Task,
    batching: EvalBatching,
    pad_token_id: int,
) -> EvalResult:
    """Evaluate what is loaded in the resident model on some examples (positions in `data`)."""
    rows = np.asarray(indices, dtype=np.int64)
    batches = plan_eval_batches(data.lengths, rows, batch_size=batching.batch_size, max_tokens=batching.max_tokens)
    total, count = 0.0, 0
    labels: list[Tensor] = []
    predictions: list[Tensor] = []
    for batch_rows in batches:
        batch = collate(data, batch_rows, pad_token_id=pad_token_id)
        loss = batch_loss(resident.model, batch, task, resident.device)
        total += float(loss.total)
        count += loss.count
        if loss.predictions is not None:
            labels.append(batch.labels)
            predictions.append(loss.predictions.cpu())
    if not predictions:
        return EvalResult(len(rows), total / count)
    accuracy, macro_f1 = _classification_metrics(torch.cat(labels), torch.cat(predictions))
    return EvalResult(len(rows), total / count, accuracy, macro_f1)


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
