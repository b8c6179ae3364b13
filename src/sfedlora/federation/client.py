"""Local training of one client: start from an adapter, take K optimizer steps, hand back the trained factors.

Nothing here knows what is shared: who makes the work names the parts that a proximal term anchors. The resident model
is overwritten with the client's adapter and left as training left it; the next client overwrites it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sfedlora.data.batches import plan_local_batches
from sfedlora.data.encoded import Batch, EncodedData, collate
from sfedlora.errors import ClientError
from sfedlora.federation.objective import Task, batch_loss
from sfedlora.lora.inject import ResidentModel
from sfedlora.seeds import derive_seed
from sfedlora.types import LoraSize, Part, Tensors

__all__ = ["ClientOutcome", "ClientWork", "LocalTraining", "TrainMetrics", "train_client"]


@dataclass(frozen=True)
class LocalTraining:
    """Hyper-parameters of local training; the configuration documents each."""

    optimizer: Literal["adamw", "sgd"]
    learning_rate_a_ratio: float
    weight_decay: float
    batch_size: int
    accumulation: int
    local_steps: int | None
    local_epochs: int | None
    max_grad_norm: float | None
    keep_optimizer_state: bool
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class ClientWork:
    """One client's work in one round.

    Attributes:
        client_id: the client.
        round_num: the round, from 1.
        start: the complete adapter it starts from.
        trained: the parts it trains.
        size: rank of `start`, and gamma.
        learning_rate: of B and the head in this round.
        indices: positions of its training examples in the encoded data.
        optimizer_state: moments kept from its earlier rounds; empty to start from zero. Those of parts that are not
            trained in this round are handed back as they are.
        anchored: the parts that the proximal term pulls towards `start`.
        base_deltas: corrections of the frozen weights, by their names in `ServerState.extra`.
    """

    client_id: str
    round_num: int
    start: Tensors
    trained: frozenset[Part]
    size: LoraSize
    learning_rate: float
    indices: Sequence[int]
    optimizer_state: Tensors
    anchored: frozenset[Part] = frozenset()
    base_deltas: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class TrainMetrics:
    """What local training measured; the proximal term is in none of it.

    Attributes:
        train_loss: mean over all labelled tokens or examples of the round's batches.
        grad_norm_a: L2 norm of the gradient of all A at the first optimizer step, before clipping; None if not trained.
        grad_norm_b: likewise for B.
        tokens: real tokens in training forwards.
        padded_tokens: pad positions besides.
        num_steps: optimizer steps taken.
    """

    train_loss: float
    grad_norm_a: float | None
    grad_norm_b: float | None
    tokens: int
    padded_tokens: int
    num_steps: int


@dataclass(frozen=True)
class ClientOutcome:
    """The trained factors of one client and what was measured."""

    client_id: str
    round_num: int
    num_examples: int
    tensors: Tensors
    optimizer_state: Tensors
    metrics: TrainMetrics


def train_client(
    resident: ResidentModel,
    data: EncodedData,
    work: ClientWork,
    training: LocalTraining,
    *,
    task: Task,
    pad_token_id: int,
    seed: int,
) -> ClientOutcome:
    """Train one client.

    With `proximal_mu` above 0 the objective is loss + mu / 2 ||theta - theta_start||^2 over the anchored parts
    (FedProx, Li et al. 2020, arXiv:1812.06127). Its gradient is added after the norms are taken and before clipping.

    Raises:
        ClientError: the loss, a gradient or a trained factor is NaN or infinite.
    """
    resident.serve(work.start, size=work.size, base_deltas=work.base_deltas)
    resident.set_trained(work.trained)
    anchors = {part: resident.flat(part).clone() for part in work.anchored & work.trained if training.proximal_mu > 0}
    optimizer = _FlatOptimizer(resident, work, training)
    steps = plan_local_batches(
        data.lengths,
        np.asarray(work.indices, dtype=np.int64),
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        accumulation=training.accumulation,
        seed=derive_seed(seed, "batches", work.client_id, work.round_num),
    )
    loss_sum, label_count, tokens, padded = 0.0, 0, 0, 0
    norms: dict[Part, float] = {}
    try:
        for step, micro_batches in enumerate(steps):
            batches = [collate(data, indices, pad_token_id=pad_token_id) for indices in micro_batches]
            loss_sum += _step_gradients(resident, batches, work, task=task, step=step, seed=seed)
            label_count += sum(batch.num_labels for batch in batches)
            tokens += sum(batch.num_tokens for batch in batches)
            padded += sum(batch.num_padded for batch in batches)
            if step == 0:
                norms = {part: float(torch.linalg.vector_norm(resident.flat_grad(part))) for part in work.trained}
            _require_finite(math.isfinite(loss_sum), "the training loss", work, step)
            _require_finite(all(map(math.isfinite, norms.values())), "the gradient", work, step)
            for part, anchor in anchors.items():
                resident.flat_grad(part).add_(resident.flat(part) - anchor, alpha=training.proximal_mu)
            _require_finite(math.isfinite(optimizer.clip()), "the gradient", work, step)
            optimizer.step()
    finally:
        resident.dropout.seeds = None
    tensors = resident.read(work.trained)
    finite = all(bool(torch.isfinite(resident.flat(part)).all()) for part in work.trained)
    _require_finite(finite, "a trained factor or its gradient", work, len(steps) - 1, when="at or before")
    metrics = TrainMetrics(loss_sum / label_count, norms.get(Part.A), norms.get(Part.B), tokens, padded, len(steps))
    state = {**work.optimizer_state, **optimizer.state()} if training.keep_optimizer_state else {}
    return ClientOutcome(work.client_id, work.round_num, len(work.indices), tensors, state, metrics)


def _step_gradients(
    resident: ResidentModel, batches: Sequence[Batch], work: ClientWork, *, task: Task, step: int, seed: int
) -> float:
    """Accumulate the gradient of the mean loss over all micro-batches of one step; return the summed loss."""
    resident.zero_grad()
    count = sum(batch.num_labels for batch in batches)
    summed = 0.0
    for index, batch in enumerate(batches):
        resident.dropout.seeds = (derive_seed(seed, "dropout", work.client_id, work.round_num, step, index),)
        loss = batch_loss(resident.model, batch, task, resident.device)
        (loss.total / count).backward()  # type: ignore[no-untyped-call]
        summed += float(loss.total.detach())
    return summed


def _require_finite(finite: bool, what: str, work: ClientWork, step: int, *, when: str = "at") -> None:
    if not finite:
        message = (
            f"{what} became NaN or infinite {when} local step {step + 1}; "
            "lower local.learning_rate or set local.max_grad_norm"
        )
        raise ClientError(message, client_id=work.client_id, round_num=work.round_num, stage="training")


class _FlatOptimizer:
    """One torch optimizer over the flat buffers: one tensor per trained part, whatever the number of layers."""

    def __init__(self, resident: ResidentModel, work: ClientWork, training: LocalTraining) -> None:
        self._params: dict[Part, nn.Parameter] = {}
        groups = []
        for part in sorted(work.trained):
            if resident.flat(part).numel() == 0:
                continue
            param = nn.Parameter(resident.flat(part), requires_grad=True)
            param.grad = resident.flat_grad(part)
            ratio = training.learning_rate_a_ratio if part is Part.A else 1.0
            groups.append({"params": [param], "lr": work.learning_rate * ratio})
            self._params[part] = param
        decay = training.weight_decay
        self._fused = training.optimizer == "adamw" and resident.device.type in {"cpu", "cuda"}
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=decay, fused=self._fused)
            if training.optimizer == "adamw"
            else torch.optim.SGD(groups, weight_decay=decay)
        )
        self._max_grad_norm = training.max_grad_norm
        self._restore(work)

    def clip(self) -> float:
        """Clip the gradient and return its norm before; 0 without clipping. An infinite norm makes it zero or NaN."""
        if self._max_grad_norm is None:
            return 0.0
        return float(nn.utils.clip_grad_norm_(list(self._params.values()), self._max_grad_norm))

    def step(self) -> None:
        """Update the buffers in place."""
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The moments as `part/name` -> CPU tensor."""
        return {
            f"{part.value}/{name}": value.detach().cpu().clone()
            for part, param in self._params.items()
            for name, value in self._optimizer.state[param].items()
        }

    def _restore(self, work: ClientWork) -> None:
        """Take up the moments; one of another size is refused here, because the fused AdamW would read past its end."""
        for key, value in work.optimizer_state.items():
            part, name = key.split("/", 1)
            param = self._params.get(Part(part))
            if param is not None:
                if name != "step" and value.shape != param.shape:
                    message = f"kept {key} has shape {tuple(value.shape)}, expected {tuple(param.shape)}"
                    raise ClientError(message, client_id=work.client_id, round_num=work.round_num, stage="training")
                on_cpu = name == "step" and not self._fused  # where torch itself keeps the step count
                self._optimizer.state[param][name] = value.to("cpu" if on_cpu else param.device, copy=True)
