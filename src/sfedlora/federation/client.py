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
from torch import Tensor

from sfedlora.data.batches import plan_local_batches
from sfedlora.data.encoded import NO_EXAMPLES, EncodedData, collate_groups
from sfedlora.errors import AdapterError, ClientError
from sfedlora.federation.flat_optimizer import FlatOptimizer
from sfedlora.federation.launches import LAUNCH_TOKENS, plan_launches
from sfedlora.federation.objective import Task, batch_loss
from sfedlora.lora.inject import ResidentModel
from sfedlora.privacy.examples import ExamplePrivacy, add_clipped, noised_gradients
from sfedlora.privacy.noise import derive_key
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
    example_privacy: ExamplePrivacy | None = None


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
        noise_key: of the client in this round, for example-level privacy; empty without.
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
    noise_key: bytes = b""


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
    """Train several clients of one round side by side, neighbours with batches of like shapes in one forward pass.

    Every client computes what it computes alone, apart from the order of summation inside matrix products: its own
    batches, mean loss, gradient norms, clipping, optimizer with its own step count, dropout masks. Clients with fewer
    steps end earlier; one whose numbers are no longer finite ends where that shows.

    Args:
        setup: model, data and hyper-parameters.
        works: the clients' work; all of one round, with the same trained parts and base deltas.

    Returns:
        An outcome or an error for each, in the order of `works`.
    """
    resident = setup.resident
    resident.serve_stack(
        [work.start for work in works], sizes=[work.size for work in works], base_deltas=works[0].base_deltas
    )
    resident.set_trained(works[0].trained)
    stack = [_Running(setup, work, slot) for slot, work in enumerate(works)]
    try:
        for step in range(max(len(client.steps) for client in stack)):
            active = [client for client in stack if client.begin_step(step)]
            if active and setup.training.example_privacy is not None:
                for client in active:
                    _accumulate_private_gradients(setup, client, setup.training.example_privacy)
            elif active:
                _accumulate_gradients(setup, stack, max(len(client.micro_batches) for client in active))
            for client in active:
                client.take_step(step)
    finally:
        resident.dropout.clear()
        resident.set_active(0, len(works))
    return [client.finish() for client in stack]


def _plan(setup: TrainingSetup, work: ClientWork) -> list[list[NDArray[np.int64]]]:
    training, lengths = setup.training, setup.data.lengths
    if training.example_privacy is not None:
        lengths = np.ones_like(lengths)  # an example's length must not decide on the batches of others
    return plan_local_batches(
        lengths,
        np.asarray(work.indices, dtype=np.int64),
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        accumulation=training.accumulation,
        seed=derive_seed(setup.seed, "batches", work.client_id, work.round_num),
        order_seed=derive_seed(setup.seed, "order of batches", work.round_num),
    )


def _accumulate_gradients(setup: TrainingSetup, stack: Sequence[_Running], num_micro_batches: int) -> None:
    """The gradient of each client's mean loss over all micro-batches of the step that it has begun."""
    setup.resident.zero_grad()
    lengths, launch_tokens = setup.data.lengths, LAUNCH_TOKENS[setup.resident.device.type]
    for micro in range(num_micro_batches):
        groups = [client.micro_batch(micro) for client in stack]
        shapes = [(len(rows), int(lengths[rows].max(initial=0))) for rows in groups]
        for start, stop in plan_launches(shapes, launch_tokens):
            setup.resident.set_active(start, stop)
            _launch(setup, stack[start:stop], groups[start:stop], micro)


def _accumulate_private_gradients(setup: TrainingSetup, client: _Running, privacy: ExamplePrivacy) -> None:
    """The gradient of the step that one client has begun, made of its examples' clipped ones and noise."""
    setup.resident.set_active(client.slot, client.slot + 1)
    [rows] = client.micro_batches
    sums = {part: torch.zeros_like(gradient) for part, gradient in client.gradients().items()}
    for at in range(len(rows)):
        setup.resident.zero_grad()
        row = rows[at : at + 1]
        _launch(setup, [client], [row], 0)
        # The loss was divided by the labels of the whole batch.
        share = client.num_labels / int(setup.data.num_label_tokens[row[0]])
        add_clipped(privacy, sums, {part: gradient * share for part, gradient in client.gradients().items()})
    batch_size = min(setup.training.batch_size, len(client.work.indices))
    noised = noised_gradients(privacy, sums, batch_size=batch_size, key=client.noise_key())
    for part, gradient in client.gradients().items():
        gradient.copy_(noised[part])


def _launch(setup: TrainingSetup, clients: Sequence[_Running], groups: Sequence[NDArray[np.int64]], micro: int) -> None:
    """One forward and backward pass over a batch of each client; some of them may be empty."""
    resident = setup.resident
    batch = collate_groups(setup.data, groups, pad_token_id=setup.pad_token_id)
    resident.dropout.seeds = tuple(client.dropout_seed(micro) for client in clients)
    resident.dropout.own_shapes = batch.own_shapes if len(clients) > 1 else None
    resident.dropout.padded_shape = batch.padded_shape
    loss = batch_loss(resident.model, batch.joined, setup.task, resident.device)
    sums = loss.per_example.view(len(clients), -1).sum(dim=1)
    counts = torch.tensor([client.num_labels for client in clients], dtype=sums.dtype, device=sums.device)
    _backward((sums / counts).sum(), is_stack=len(clients) > 1)
    for client, rows, value in zip(clients, groups, sums.tolist(), strict=True):
        client.note_batch(rows, value, num_computed=math.prod(batch.padded_shape))


def _backward(loss: Tensor, *, is_stack: bool) -> None:
    """Backward; a stack's parameters are views with gaps, of which autograd says once that denser ones are faster."""
    if not is_stack:
        loss.backward()  # type: ignore[no-untyped-call]
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract", UserWarning)
        loss.backward()  # type: ignore[no-untyped-call]


class _Running:
    """One client while it trains: its slot of the resident model, its optimizer, and what was measured so far.

    Attributes:
        work: what it was given.
        slot: where it is in the resident model.
        steps: its micro-batches, step by step.
        micro_batches: those of the step that it has begun; none where it has finished or failed.
        num_labels: labels of these, over which the mean loss is taken; 1 without any.
    """

    def __init__(self, setup: TrainingSetup, work: ClientWork, slot: int) -> None:
        self.work, self.slot, self.steps = work, slot, _plan(setup, work)
        self.micro_batches: list[NDArray[np.int64]] = []
        self.num_labels = 1
        self._setup, self._resident = setup, setup.resident
        self._parts = sorted(work.trained)
        mu = setup.training.proximal_mu
        self._anchors = {part: self._flat(part).clone() for part in work.anchored & work.trained if mu > 0}
        self._optimizer = _optimizer_of(setup, work, slot)
        self._step = 0
        self._norms: dict[Part, float] = {}
        self._loss_sum, self._label_count, self._tokens, self._padded = 0.0, 0, 0, 0
        self._error: ClientError | None = None
        try:
            self._optimizer.restore(work.optimizer_state)
        except AdapterError as error:
            self._error = _training_error(str(error), work)

    def begin_step(self, step: int) -> bool:
        """Take up the micro-batches of a step; False for a client that has finished or failed."""
        self._step = step
        self.micro_batches = self.steps[step] if self._error is None and step < len(self.steps) else []
        labels = self._setup.data.num_label_tokens
        self.num_labels = sum(int(labels[rows].sum()) for rows in self.micro_batches) if self.micro_batches else 1
        return bool(self.micro_batches)

    def micro_batch(self, micro: int) -> NDArray[np.int64]:
        """The examples of a micro-batch of this step; none where there are fewer."""
        return self.micro_batches[micro] if micro < len(self.micro_batches) else NO_EXAMPLES

    def dropout_seed(self, micro: int) -> int:
        """The seed of all dropout masks of a micro-batch of this step."""
        work = self.work
        return derive_seed(self._setup.seed, "dropout", work.client_id, work.round_num, self._step, micro)

    def noise_key(self) -> bytes:
        """The key of the noise of this step."""
        return derive_key(self.work.noise_key, "step", self._step)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient buffers, by part."""
        return {part.value: self._grad(part) for part in self._parts}

    def note_batch(self, indices: NDArray[np.int64], loss_sum: float, *, num_computed: int) -> None:
        """Add one micro-batch to what is measured; `num_computed` counts its positions, padding included."""
        num_tokens = int(self._setup.data.lengths[indices].sum())
        self._loss_sum += loss_sum
        self._tokens += num_tokens
        self._padded += num_computed - num_tokens

    def take_step(self, step: int) -> None:
        """Check, clip and apply the gradients of a step; a client that fails stays as it is."""
        try:
            self._label_count += self.num_labels
            if step == 0:
                self._norms = {part: float(torch.linalg.vector_norm(self._grad(part))) for part in self._parts}
            _require_finite(math.isfinite(self._loss_sum), "the training loss", self.work, step)
            _require_finite(all(map(math.isfinite, self._norms.values())), "the gradient", self.work, step)
            for part, anchor in self._anchors.items():
                self._grad(part).add_(self._flat(part) - anchor, alpha=self._setup.training.proximal_mu)
            _require_finite(math.isfinite(self._optimizer.clip()), "the gradient", self.work, step)
            self._optimizer.step()
        except ClientError as error:
            self._error = error.with_traceback(None)

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
            return error.with_traceback(None)
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


def _optimizer_of(setup: TrainingSetup, work: ClientWork, slot: int) -> FlatOptimizer:
    training = setup.training
    ratios = {Part.A: training.learning_rate_a_ratio}
    return FlatOptimizer(
        setup.resident,
        slot,
        kind=training.optimizer,
        learning_rates={part: work.learning_rate * ratios.get(part, 1.0) for part in work.trained},
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
    )


def _require_finite(finite: bool, what: str, work: ClientWork, step: int, *, when: str = "at") -> None:
    if not finite:
        raise _training_error(
            f"{what} became NaN or infinite {when} local step {step + 1}; "
            "lower local.learning_rate or set local.max_grad_norm",
            work,
        )


def _training_error(reason: str, work: ClientWork) -> ClientError:
    return ClientError(reason, client_id=work.client_id, round_num=work.round_num, stage="training")
