"""What a federated method is, and the one way in to its server step.

A method is a frozen dataclass with pure functions. `aggregate` checks the updates, puts them into client-id order
and gives the method their weights, so no method can depend on arrival order or see a malformed update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sfedlora.errors import UpdateError
from sfedlora.lora.algebra import weighted_mean
from sfedlora.types import Part, ServerState, Tensors, Update, part_of, select_parts

__all__ = [
    "ALL_PARTS",
    "Contribution",
    "Exactness",
    "HeadPlacement",
    "Method",
    "Weighting",
    "aggregate",
    "check_update",
    "client_weights",
    "mean_of_parts",
    "mean_of_shared",
]

Exactness = Literal["model", "factor", "truncated", "no"]
HeadPlacement = Literal["personal", "shared"]
Weighting = Literal["examples", "uniform"]
ALL_PARTS = frozenset(Part)


@dataclass(frozen=True)
class Contribution:
    """One client's share of a server step.

    Attributes:
        client_id: the client.
        tensors: the factors it sent.
        weight: p_k; the weights of a step add up to 1.
    """

    client_id: str
    tensors: Tensors
    weight: float


class Method(Protocol):
    """A federated LoRA method.

    Attributes:
        name: its name in the configuration.
        exact: what the server step reproduces of Ideal = sum_k p_k s_k B_k A_k: `model` (all of it), `factor` (the mean
            of one factor), `truncated` (its best approximation at the rank), or `no`.
        averages_a: whether the initial A is the average over the clients' draws, so that N_eff enters `sfed`.
        pools_data: one participant trains on all clients' data.
    """

    name: ClassVar[str]
    exact: ClassVar[Exactness]
    averages_a: ClassVar[bool]
    pools_data: ClassVar[bool]

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """The parts that clients train in this round."""
        ...

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """The parts that the updates of this round carry up to the server."""
        ...

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """The parts that go down to a client at the start of this round.

        Args:
            round_num: the round.
            is_current: whether the client received the broadcast of the round before; in round 1 all are current.
        """
        ...

    def personal_parts(self) -> frozenset[Part]:
        """The parts that never leave a client and are kept there from round to round."""
        ...

    def server_step(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """The state after the round, from contributions in client-id order. `round_num` is set by `aggregate`."""
        ...


def client_weights(num_examples: Mapping[str, int], weighting: Weighting) -> dict[str, float]:
    """The weight p_k of every client, in client-id order, adding up to 1."""
    counts = {client_id: float(num_examples[client_id]) for client_id in sorted(num_examples)}
    if weighting == "uniform":
        counts = dict.fromkeys(counts, 1.0)
    total = sum(counts.values())
    return {client_id: count / total for client_id, count in counts.items()}


def aggregate(method: Method, state: ServerState, updates: Sequence[Update], *, weighting: Weighting) -> ServerState:
    """One server step.

    Args:
        method: the method.
        state: the state before the round; not changed.
        updates: the replies of the round, in any order; not changed.
        weighting: by training examples, or uniform.

    Returns:
        The state after the round, its `round_num` one higher.

    Raises:
        UpdateError: no update, two from one client, one of another round, one without examples, or one with a missing,
            extra or non-finite tensor or one of another shape or dtype. The message names the client and the tensor.
    """
    round_num = state.round_num + 1
    _check_all(method, state, updates)
    by_id = {update.client_id: update for update in updates}
    weights = client_weights({client_id: update.num_examples for client_id, update in by_id.items()}, weighting)
    contributions = [Contribution(client_id, by_id[client_id].tensors, weight) for client_id, weight in weights.items()]
    return replace(method.server_step(state, contributions), round_num=round_num)


def mean_of_shared(state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
    """Replace every factor that was sent by its weighted mean; keep the others.

    X = sum_k p_k X_k     for X in the sent parts
    """
    mean = mean_of_parts(contributions, Part)
    return replace(state, shared={name: mean.get(name, tensor) for name, tensor in state.shared.items()})


def mean_of_parts(contributions: Sequence[Contribution], parts: Iterable[Part]) -> dict[str, Tensor]:
    """X = sum_k p_k X_k of the factors that were sent, for X in some parts."""
    chosen = frozenset(parts)
    return weighted_mean((item.weight, select_parts(item.tensors, chosen)) for item in contributions)


def _check_all(method: Method, state: ServerState, updates: Sequence[Update]) -> None:
    round_num = state.round_num + 1
    if not updates:
        raise UpdateError(f"round {round_num} has no update to aggregate", client_id="(none)")
    seen: set[str] = set()
    for update in updates:
        if update.client_id in seen:
            raise UpdateError(f"sent a second update for round {round_num}; expected one", client_id=update.client_id)
        seen.add(update.client_id)
        check_update(method, state, update)


def check_update(method: Method, state: ServerState, update: Update) -> None:
    """Check one update against what this round shares.

    Raises:
        UpdateError: another round, no examples, a missing, extra or non-finite tensor, or another shape or dtype.
    """
    round_num = state.round_num + 1
    expected = select_parts(state.shared, method.shared_parts(round_num))
    client_id = update.client_id
    if update.round_num != round_num:
        raise UpdateError(f"is for round {update.round_num}; the open round is {round_num}", client_id=client_id)
    if update.num_examples < 1:
        raise UpdateError(f"states {update.num_examples} training examples; expected at least 1", client_id=client_id)
    for name in expected:
        if name not in update.tensors:
            raise UpdateError("is missing", client_id=client_id, tensor=name)
    for name, tensor in update.tensors.items():
        if name not in expected:
            parts = ", ".join(sorted({part_of(known).value for known in expected})) or "no"
            message = f"was not asked for; this round shares {parts} factors"
            raise UpdateError(message, client_id=client_id, tensor=name)
        if tensor.shape != expected[name].shape:
            message = f"has shape {tuple(tensor.shape)}; expected {tuple(expected[name].shape)}"
            raise UpdateError(message, client_id=client_id, tensor=name)
        if tensor.dtype != expected[name].dtype:
            message = f"has dtype {tensor.dtype}; expected {expected[name].dtype}"
            raise UpdateError(message, client_id=client_id, tensor=name)
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateError("holds NaN or infinite values", client_id=client_id, tensor=name)
