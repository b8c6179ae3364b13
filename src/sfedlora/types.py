"""The values that flow between the parts: factor names, adapter layout, updates, server state.

Tensors travel as flat mappings from a factor name to a tensor. A factor name is `part:path`:

    a:<module path>     LoRA A of one target module, shape (rank, in_features)
    b:<module path>     LoRA B of one target module, shape (out_features, rank)
    head:<parameter>    a parameter trained and saved in full (classification head), shape as in the model

Nothing here computes; verbs live in `lora`, `methods` and `federation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

__all__ = [
    "AdapterLayout",
    "LoraSize",
    "LoraSizes",
    "Part",
    "ServerState",
    "Target",
    "Tensors",
    "Update",
    "factor_name",
    "part_of",
    "path_of",
    "select_parts",
]

Tensors = Mapping[str, Tensor]


class Part(StrEnum):
    """The three kinds of trained tensors."""

    A = "a"
    B = "b"
    HEAD = "head"


def factor_name(part: Part, path: str) -> str:
    """Name of a factor, for example `a:model.layers.0.self_attn.q_proj`."""
    return f"{part.value}:{path}"


def part_of(name: str) -> Part:
    """The part that a factor name belongs to."""
    return Part(name.split(":", 1)[0])


def path_of(name: str) -> str:
    """The module path (A, B) or parameter path (head) inside a factor name."""
    return name.split(":", 1)[1]


def select_parts(tensors: Tensors, parts: Iterable[Part]) -> dict[str, Tensor]:
    """The factors of `tensors` whose part is in `parts`, in the same order, not copied."""
    wanted = frozenset(parts)
    return {name: tensors[name] for name in tensors if part_of(name) in wanted}


@dataclass(frozen=True)
class Target:
    """One frozen linear module that carries a LoRA pair."""

    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AdapterLayout:
    """Which factors an adapter has, apart from its rank.

    Attributes:
        targets: the adapted modules in model order.
        head: parameter path -> shape for every parameter trained in full.
        head_modules: the modules those parameters belong to (`modules_to_save` in PEFT's vocabulary).
    """

    targets: tuple[Target, ...]
    head: Mapping[str, tuple[int, ...]]
    head_modules: tuple[str, ...] = ()

    def shapes(self, rank: int, parts: Iterable[Part] = tuple(Part)) -> dict[str, tuple[int, ...]]:
        """Factor name -> shape at one rank: every A, then every B, then the head."""
        wanted = frozenset(parts)
        shapes: dict[str, tuple[int, ...]] = {}
        if Part.A in wanted:
            shapes |= {factor_name(Part.A, t.path): (rank, t.in_features) for t in self.targets}
        if Part.B in wanted:
            shapes |= {factor_name(Part.B, t.path): (t.out_features, rank) for t in self.targets}
        if Part.HEAD in wanted:
            shapes |= {factor_name(Part.HEAD, path): shape for path, shape in self.head.items()}
        return shapes


@dataclass(frozen=True)
class LoraSize:
    """Rank and gamma of one adapter."""

    rank: int
    scaling: float


@dataclass(frozen=True)
class LoraSizes:
    """The sizes of all adapters of a federation.

    Attributes:
        server: that of the shared factors; its rank is the largest of all.
        clients: client id -> its own size; empty where all clients have the server's.
        draw_rank: rank of random draws, of which a client takes its first rows; None: the server's.
    """

    server: LoraSize
    clients: Mapping[str, LoraSize] = field(default_factory=dict)
    draw_rank: int | None = None

    def of(self, client_id: str) -> LoraSize:
        """The size of one client's adapter."""
        return self.clients.get(client_id, self.server)


@dataclass(frozen=True)
class Update:
    """What one client sends to the server after local training.

    Attributes:
        client_id: who sends it.
        round_num: the round it was trained in, from 1.
        num_examples: training examples of the client (its weight under `weighting: examples`).
        tensors: the factors that the method shares in this round.
    """

    client_id: str
    round_num: int
    num_examples: int
    tensors: Tensors


@dataclass(frozen=True)
class ServerState:
    """Everything the server carries from one round to the next.

    Attributes:
        round_num: the last finished round; 0 before round 1.
        shared: the factors that a broadcast is made from.
        extra: what is kept besides (server optimizer moments, base deltas), by names of its own.
    """

    round_num: int
    shared: Tensors
    extra: Tensors
