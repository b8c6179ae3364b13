"""The one way in to a method's server step, and the one way out of it: what a client gets.

`aggregate` checks the updates, puts them into client-id order and gives the method their weights, so no method can
depend on arrival order or see a malformed update.

Not here: what a method is (`base`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sfedlora.errors import UpdateError
from sfedlora.lora.base_delta import broadcast_deltas
from sfedlora.methods.base import Contribution, Method, Weighting
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Tensors, Update, part_of, select_parts

__all__ = ["aggregate", "broadcast_tensors", "check_update", "check_updates", "client_factors", "client_weights"]


def client_weights(num_examples: Mapping[str, int], weighting: Weighting) -> dict[str, float]:
    """The weight p_k of every client, in client-id order, adding up to 1."""
    counts = {client_id: float(num_examples[client_id]) for client_id in sorted(num_examples)}
    if weighting == "uniform":
        counts = dict.fromkeys(counts, 1.0)
    total = sum(counts.values())
    return {client_id: count / total for client_id, count in counts.items()}


def aggregate(
    method: Method, state: ServerState, updates: Sequence[Update], *, weighting: Weighting, sizes: LoraSizes
) -> ServerState:
    """One server step.

    Args:
        method: the method.
        state: the state before the round; not changed.
        updates: the replies of the round, in any order; not changed.
        weighting: by training examples, or uniform.
        sizes: rank and gamma of the shared factors and of every client's.

    Returns:
        The state after the round, its `round_num` one higher.

    Raises:
        UpdateError: no update, two from one client, one of another round, one without examples, or one with a missing,
            extra or non-finite tensor or one of another shape or dtype. The message names the client and the tensor.
    """
    round_num = state.round_num + 1
    check_updates(method, state, updates, sizes)
    by_id = {update.client_id: update for update in updates}
    weights = client_weights({client_id: update.num_examples for client_id, update in by_id.items()}, weighting)
    contributions = [
        Contribution(client_id, by_id[client_id].tensors, weight, sizes.of(client_id).scaling)
        for client_id, weight in weights.items()
    ]
    return replace(method.server_step(state, contributions, sizes.server), round_num=round_num)


def client_factors(method: Method, shared: Tensors, *, server: LoraSize, client: LoraSize) -> Tensors:
    """What a client of some size gets of shared factors: the first rows of A and columns of B, as many as its rank.

    Where the method keeps products, B is scaled by gamma of the server over gamma of the client.
    """
    if client == server:
        return shared
    cut = {name: _cut(name, tensor, client.rank) for name, tensor in shared.items()}
    if method.traits.keeps_products:
        ratio = server.scaling / client.scaling
        cut |= {name: tensor * ratio for name, tensor in select_parts(cut, [Part.B]).items()}
    return cut


def broadcast_tensors(
    method: Method, state: ServerState, *, is_current: bool, server: LoraSize, client: LoraSize
) -> dict[str, Tensor]:
    """Everything that goes down to a client of some size at the start of the round after `state`."""
    parts = method.broadcast_parts(state.round_num + 1, is_current=is_current)
    factors = client_factors(method, select_parts(state.shared, parts), server=server, client=client)
    return {**factors, **broadcast_deltas(state.extra, is_current=is_current)}


def check_updates(method: Method, state: ServerState, updates: Sequence[Update], sizes: LoraSizes) -> None:
    """Check all updates of a round: at least one, none twice, and each as `check_update` does.

    Raises:
        UpdateError: the first that is wrong.
    """
    round_num = state.round_num + 1
    if not updates:
        raise UpdateError(f"round {round_num} has no update to aggregate", client_id="(none)")
    seen: set[str] = set()
    for update in updates:
        if update.client_id in seen:
            raise UpdateError(f"sent a second update for round {round_num}; expected one", client_id=update.client_id)
        seen.add(update.client_id)
        check_update(method, state, update, sizes)


def check_update(method: Method, state: ServerState, update: Update, sizes: LoraSizes) -> None:
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
        shape = _shape_at(name, expected[name], sizes.of(client_id).rank)
        if tuple(tensor.shape) != shape:
            message = f"has shape {tuple(tensor.shape)}; expected {shape}"
            raise UpdateError(message, client_id=client_id, tensor=name)
        if tensor.dtype != expected[name].dtype:
            message = f"has dtype {tensor.dtype}; expected {expected[name].dtype}"
            raise UpdateError(message, client_id=client_id, tensor=name)
        if not _is_finite(tensor):
            raise UpdateError("holds NaN or infinite values", client_id=client_id, tensor=name)


def _cut(name: str, tensor: Tensor, rank: int) -> Tensor:
    if part_of(name) is Part.HEAD:
        return tensor
    return tensor[:rank] if part_of(name) is Part.A else tensor[:, :rank]


def _shape_at(name: str, tensor: Tensor, rank: int) -> tuple[int, ...]:
    """The shape of a factor at another rank."""
    if part_of(name) is Part.HEAD:
        return tuple(tensor.shape)
    return (rank, tensor.shape[1]) if part_of(name) is Part.A else (tensor.shape[0], rank)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite.

    A NaN or infinity always shows in the sum, which costs a fifteenth of a look at each; finite values whose sum
    overflows are looked at each.
    """
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
