"""Local training: clients start from an adapter, take K optimizer steps, hand back the trained factors.

One client at a time, or several side by side on one frozen base (`train_clients`).

Nothing here knows what is shared: who makes the work names the parts that a proximal term anchors. The resident model
is overwritten with the clients' adapters and left as training left it; the next ones overwrite it again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfedlora.data.batches import plan_local_batches
from sfedlora.data.encoded import NO_EXAMPLES, EncodedData, collate_groups
from sfedlora.errors import ClientError
from sfedlora.federation.objective import Task, batch_loss
from sfedlora.lora.inject import ResidentModel
from sfedlora.seeds import derive_seed
from sfedlora.types import LoraSize, Part, Tensors

__all__ = [
    "ClientOutcome",
    "ClientWork",
    "LocalTraining",
    "TrainMetrics",
    "TrainingSetup",
    "train_client",
    "train_clients",
]


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


@dataclass(frozen=True)
class TrainingSetup:
    """What local training needs besides a client's work; the same for all clients of a run.

    Attributes:
        resident: the adapted model; it is overwritten.
        data: all encoded examples.
        training: hyper-parameters.
        task, pad_token_id, seed: as named.
    """

    resident: ResidentModel
    data: EncodedData
    training: LocalTraining
    task: Task
    pad_token_id: int
    seed: int


def train_client(setup: TrainingSetup, work: ClientWork) -> ClientOutcome:
    """Train one client.

    With `proximal_mu` above 0 the objective is loss + mu / 2 ||theta - theta_start||^2 over the anchored parts
    (FedProx, Li et al. 2020, arXiv:1812.06127). Its gradient is added after the norms are taken and before clipping.

    Raises:
        ClientError: the loss, a gradient or a trained factor is NaN or infinite.
    """
    [result] = train_clients(setup, [work])
    if isinstance(result, ClientError):
        raise result
    return result


def train_clients(setup: TrainingSetup, works: Sequence[ClientWork]) -> list[ClientOutcome | ClientError]:
    """Train several clients of one round side by side, their batches stacked to one forward pass per step.

    Every client computes what it computes alone, apart from the order of summation inside matrix products: its own
    batches, mean loss, gradient norms, clipping, optimizer with its own step count, dropout masks. Clients with fewer
    steps drop out early; one whose numbers are no longer finite is no longer updated.

    Args:
        setup: model, data and hyper-parameters.
        works: the clients' work; all of one round, with the same trained parts and base deltas.

    Returns:
        An outcome or an error for each, in the order of `works`.
    """
    resident = setup.resident
    steps = [_plan(setup, work) for work in works]
    order = sorted(range(len(works)), key=lambda index: -len(steps[index]))  # those that end early come last
    ordered = [works[index] for index in order]
    resident.serve_stack(
        [work.start for work in ordered], sizes=[work.size for work in ordered], base_deltas=works[0].base_deltas
    )
    resident.set_trained(works[0].trained)
    running = [_Running(setup, works[index], steps[index], slot) for slot, index in enumerate(order)]
    try:
        for step in range(len(running[0].steps)):
            active = [client for client in running if step < len(client.steps)]
            if len(active) < len(running):
                resident.set_active(len(active))
            _accumulate_gradients(setup, active, step)
            for client in active:
                client.take_step(step)
    finally:
        resident.dropout.seeds = resident.dropout.own_shapes = None
    finished = {running[slot].work.client_id: running[slot].finish() for slot in range(len(order))}
    return [finished[work.client_id] for work in works]


def _plan(setup: TrainingSetup, work: ClientWork) -> list[list[NDArray[np.int64]]]:
    training = setup.training
    return plan_local_batches(
        setup.data.lengths,
        np.asarray(work.indices, dtype=np.int64),
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        accumulation=training.accumulation,
        seed=derive_seed(setup.seed, "batches", work.client_id, work.round_num),
        order_seed=derive_seed(setup.seed, "order of batches", work.round_num),
    )


def _accumulate_gradients(setup: TrainingSetup, active: Sequence[_Running], step: int) -> None:
    """The gradient of each client's mean loss over all micro-batches of one step."""
    resident = setup.resident
    resident.zero_grad()
    for client in active:
        client.begin_step(step)
    for micro in range(max(len(client.steps[step]) for client in active)):
        groups = [client.steps[step][micro] if micro < len(client.steps[step]) else NO_EXAMPLES for client in active]
        batch = collate_groups(setup.data, groups, pad_token_id=setup.pad_token_id)
        resident.dropout.seeds = tuple(
            derive_seed(setup.seed, "dropout", client.work.client_id, client.work.round_num, step, micro)
            for client in active
        )
        resident.dropout.own_shapes = batch.own_shapes if len(active) > 1 else None
        resident.dropout.padded_shape = batch.padded_shape
        loss = batch_loss(resident.model, batch.joined, setup.task, resident.device)
        sums = loss.per_example.view(len(active), -1).sum(dim=1)
        counts = torch.tensor([client.step_labels for client in active], dtype=sums.dtype, device=sums.device)
        _backward((sums / counts).sum())
        for client, group, value in zip(active, groups, sums.tolist(), strict=True):
            client.note_batch(group, value, num_computed=math.prod(batch.padded_shape))


def _backward(loss: Tensor) -> None:
    """Backward; a stack's parameters are views with gaps, of which autograd says once that denser ones are faster."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract", UserWarning)
        loss.backward()  # type: ignore[no-untyped-call]


class _Running:
    """One client while it trains: its slot of the resident model, its optimizer, and what was measured so far."""

    def __init__(self, setup: TrainingSetup, work: ClientWork, steps: list[list[NDArray[np.int64]]], slot: int) -> None:
        self.work, self.steps, self.slot = work, steps, slot
        self.step_labels = 0
        self._setup, self._resident = setup, setup.resident
        self._parts = sorted(work.trained)
        mu = setup.training.proximal_mu
        self._anchors = {part: self._flat(part).clone() for part in work.anchored & work.trained if mu > 0}
        self._optimizer = _FlatOptimizer(self._resident, work, setup.training, slot)
        self._norms: dict[Part, float] = {}
        self._loss_sum, self._label_count, self._tokens, self._padded = 0.0, 0, 0, 0
        self._error: ClientError | None = None

    def begin_step(self, step: int) -> None:
        """Count the labels that the mean loss of a step is taken over."""
        labels = self._setup.data.num_label_tokens
        self.step_labels = sum(int(labels[indices].sum()) for indices in self.steps[step])

    def note_batch(self, indices: NDArray[np.int64], loss_sum: float, *, num_computed: int) -> None:
        """Add one micro-batch to what is measured; `num_computed` counts its positions, padding included."""
        num_tokens = int(self._setup.data.lengths[indices].sum())
        self._loss_sum += loss_sum
        self._tokens += num_tokens
        self._padded += num_computed - num_tokens

    def take_step(self, step: int) -> None:
        """Check, clip and apply the gradients of a step; a client that failed stays as it is."""
        if self._error is not None:
            return
        try:
            self._label_count += self.step_labels
            if step == 0:
                self._norms = {part: float(torch.linalg.vector_norm(self._grad(part))) for part in self._parts}
            _require_finite(math.isfinite(self._loss_sum), "the training loss", self.work, step)
            _require_finite(all(map(math.isfinite, self._norms.values())), "the gradient", self.work, step)
            for part, anchor in self._anchors.items():
                self._grad(part).add_(self._flat(part) - anchor, alpha=self._setup.training.proximal_mu)
            _require_finite(math.isfinite(self._optimizer.clip()), "the gradient", self.work, step)
            self._optimizer.step()
        except ClientError as error:
            self._error = error

    def finish(self) -> ClientOutcome | ClientError:
        """The outcome, or what went wrong."""
        work, keep = self.work, self._setup.training.keep_optimizer_state
        if self._error is not None:
            return self._error
        try:
            finite = all(bool(torch.isfinite(self._flat(part)).all()) for part in self._parts)
            what = "a trained factor or its gradient"
            _require_finite(finite, what, work, len(self.steps) - 1, when="at or before")
        except ClientError as error:
            return error
        metrics = TrainMetrics(
            self._loss_sum / self._label_count,
            self._norms.get(Part.A),
            self._norms.get(Part.B),
            self._tokens,
            self._padded,
            len(self.steps),
        )
        state = {**work.optimizer_state, **self._optimizer.state()} if keep else {}
        tensors = self._resident.read(work.trained, self.slot)
        return ClientOutcome(work.client_id, work.round_num, len(work.indices), tensors, state, metrics)

    def _flat(self, part: Part) -> Tensor:
        return self._resident.flat(part, self.slot)

    def _grad(self, part: Part) -> Tensor:
        return self._resident.flat_grad(part, self.slot)


def _require_finite(finite: bool, what: str, work: ClientWork, step: int, *, when: str = "at") -> None:
    if not finite:
        message = (
            f"{what} became NaN or infinite {when} local step {step + 1}; "
            "lower local.learning_rate or set local.max_grad_norm"
        )
        raise ClientError(message, client_id=work.client_id, round_num=work.round_num, stage="training")


class _FlatOptimizer:
    """One torch optimizer over the flat buffers: one tensor per trained part, whatever the number of layers."""

    def __init__(self, resident: ResidentModel, work: ClientWork, training: LocalTraining, slot: int) -> None:
        self._params: dict[Part, nn.Parameter] = {}
        groups = []
        for part in sorted(work.trained):
            flat = resident.flat(part, slot)
            if flat.numel() == 0:
                continue
            param = nn.Parameter(flat, requires_grad=True)
            param.grad = resident.flat_grad(part, slot)
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
