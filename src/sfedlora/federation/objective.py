"""The loss of a batch, as a sum, so that means over any set of examples are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sfedlora.data.encoded import Batch

__all__ = ["BatchLoss", "Task", "batch_loss"]

Task = Literal["causal-lm", "sequence-classification"]
IGNORED = -100


@dataclass(frozen=True)
class BatchLoss:
    """Cross-entropy of one batch.

    Attributes:
        total: sum over labelled tokens or examples, float32, a scalar that carries the gradient.
        count: labelled tokens or examples.
        predictions: (batch,) predicted class ids for classification, else None.
    """

    total: Tensor
    count: int
    predictions: Tensor | None


def batch_loss(model: PreTrainedModel, batch: Batch, task: Task, device: torch.device) -> BatchLoss:
    """Run the model on a batch and sum its cross-entropy in float32."""
    labels = batch.labels.to(device)
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids.to(device)
    if task == "causal-lm":
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        labelled = targets != IGNORED
        total = functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="sum")
        return BatchLoss(total, batch.num_labels, None)
    logits = model(**inputs).logits
    total = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return BatchLoss(total, batch.num_labels, logits.detach().argmax(dim=-1))
