"""The loss of a batch, as sums over its examples, so that means over any set of examples are exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sfedlora.data.encoded import Batch
from sfedlora.federation.label_head import label_losses

__all__ = ["BatchLoss", "Task", "batch_loss"]

Task = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True)
class BatchLoss:
    """Cross-entropy of one batch.

    Attributes:
        count: labelled tokens or examples.
        predictions: (batch,) predicted class ids for classification, else None.
        per_example: (batch,) float32, the sum over each example's labelled tokens, or its loss for classification; it
            carries the gradient too. Clients stacked in one batch weight its groups each by its own count.
    """

    count: int
    predictions: Tensor | None
    per_example: Tensor

    @property
    def total(self) -> Tensor:
        """The sum over labelled tokens or examples, a float32 scalar that carries the gradient."""
        return self.per_example.sum()


def batch_loss(model: PreTrainedModel, batch: Batch, task: Task, device: torch.device) -> BatchLoss:
    """Run the model on a batch and sum its cross-entropy in float32.

    Causal-lm: only labelled positions reach the output head, a chunk at a time (`label_head`).
    """
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids.to(device)
    if task == "causal-lm":
        per_example = label_losses(model, inputs, batch.labels).sum(dim=1)
        return BatchLoss(batch.num_labels, None, per_example)
    logits = model(**inputs).logits
    per_example = functional.cross_entropy(logits.float(), batch.labels.to(device), reduction="none")
    return BatchLoss(batch.num_labels, logits.detach().argmax(dim=-1), per_example)
