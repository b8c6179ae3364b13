"""What a federated method is, and the means that several of them take.

A method is a frozen dataclass with pure functions. Its server step is called by `aggregation.aggregate` alone, with
updates that were checked and put into client-id order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sfedlora.lora.algebra import weighted_mean
from sfedlora.types import LoraSize, Part, ServerState, Tensors, factor_name, part_of, path_of, select_parts

__all__ = [
    "ALL_PARTS",
    "Contribution",
    "Exactness",
    "HeadPlacement",
    "Method",
    "Traits",
    "Weighting",
    "mean_of_parts",
    "mean_of_rows",
    "mean_of_shared",
    "module_factors",
    "padded",
    "rank_of",
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
        tensors: the factors it sent, of its own rank.
        weight: p_k; the weights of a step add up to 1.
        scaling: s_k, the gamma that it trained with.
    """

    client_id: str
    tensors: Tensors
    weight: float
    scaling: float


@dataclass(frozen=True)
class Traits:
    """What a method is, apart from its arithmetic. The defaults describe a plain average of factors.

    Attributes:
        exact: what the server step reproduces of Ideal = sum_k p_k s_k B_k A_k: `model` (all of it), `factor` (the mean
            of one factor), `truncated` (its best approximation at the rank), or `no`.
        is_mean: whether the server step is a weighted mean of each sent factor and nothing else, so that noise on that
            mean, secure aggregation and robust means take its place without another change.
        averages_a: whether the initial A is the average over the clients' draws, so that N_eff enters `sfed`.
        heterogeneous_ranks: whether clients may have ranks of their own.
        keeps_products: whether B is rescaled for a client of another gamma, so that its product s_k B A stays the
            server's (cut to its rank).
        caps_rank: whether ranks above min(in_features, out_features) of a module are refused.
        server_optimizers: whether a server optimizer may step along the change of the factors.
        restarts: whether every client begins every round with a new draw of A and B = 0.
        pools_data: whether one participant trains on all clients' data.
    """

    exact: Exactness
    is_mean: bool = True
    averages_a: bool = True
    heterogeneous_ranks: bool = False
    keeps_products: bool = False
    caps_rank: bool = False
    server_optimizers: bool = True
    restarts: bool = False
    pools_data: bool = False


class Method(Protocol):
    """A federated LoRA method.

    Attributes:
        name: its name in the configuration.
        traits: what the rest of the library needs to know of it.
    """

    name: ClassVar[str]
    traits: ClassVar[Traits]

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

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """The state after the round; `round_num` is set by `aggregate`.

        Args:
            state: the state before the round; not to be changed.
            contributions: what the cohort sent, in client-id order; not to be changed.
            size: rank and gamma of the shared factors.
        """
        ...


def padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A factor with rows (A) or columns (B) of zeros after its own, up to a rank; any other tensor as it is."""
    if part_of(name) is Part.HEAD:
        return tensor
    axis = 0 if part_of(name) is Part.A else 1
    missing = rank - tensor.shape[axis]
    if missing == 0:
        return tensor
    shape = (missing, tensor.shape[1]) if axis == 0 else (tensor.shape[0], missing)
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def rank_of(tensors: Tensors) -> int:
    """The rank of an adapter's factors."""
    return next(tensor.shape[0] for name, tensor in tensors.items() if part_of(name) is Part.A)


def module_factors(tensors: Tensors) -> Iterator[tuple[str, str]]:
    """The names of A and B of every module that has an A, in order."""
    for name in tensors:
        if part_of(name) is Part.A:
            yield name, factor_name(Part.B, path_of(name))


def mean_of_shared(state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
    """Replace every factor that was sent by its weighted mean; keep the others.

    X = sum_k p_k X_k     for X in the sent parts
    """
    mean = mean_of_parts(contributions, Part)
    return replace(state, shared={name: mean.get(name, tensor) for name, tensor in state.shared.items()})


def mean_of_rows(state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
    """`mean_of_shared`, where a row of A is averaged over the clients whose rank reaches it.

    A_j = sum_{k: r_k > j} p_k A_kj / sum_{k: r_k > j} p_k     A row that no client sent stays as it was.
    """
    ranks = {item.client_id: rank_of(item.tensors) for item in contributions}
    if len({*ranks.values(), rank_of(state.shared)}) == 1:
        return mean_of_shared(state, contributions)
    head = mean_of_parts(contributions, [Part.HEAD])
    shared = {name: head.get(name, tensor) for name, tensor in state.shared.items()}
    start = 0
    for end in sorted({*ranks.values()}):
        senders = [item for item in contributions if ranks[item.client_id] >= end]
        total = sum(item.weight for item in senders)
        band = weighted_mean((item.weight / total, _rows(item.tensors, start, end)) for item in senders)
        for name, rows in band.items():
            shared[name] = torch.cat([shared[name][:start], rows, shared[name][end:]])
        start = end
    return replace(state, shared=shared)


def _rows(tensors: Tensors, start: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[start:end] for name, tensor in select_parts(tensors, [Part.A]).items()}


def mean_of_parts(contributions: Sequence[Contribution], parts: Iterable[Part]) -> dict[str, Tensor]:
    """X = sum_k p_k X_k of the factors that were sent, for X in some parts."""
    chosen = frozenset(parts)
    return weighted_mean((item.weight, select_parts(item.tensors, chosen)) for item in contributions)
