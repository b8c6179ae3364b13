"""One row per method, and the rounds that the contract is judged on.

A scene is a server before a round and what every client holds after local training. What clients serve is measured on
real adapted modules (the layer applied to the identity), base deltas included, so a transposed factor or a wrong
scaling shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from contract.numpy_oracle import (
    Dense,
    Held,
    Module,
    base_after_fedex,
    base_after_flora,
    gamma_of,
    served_fair,
    served_fedex,
    served_fedit,
    served_fedsa,
    served_ffa,
    served_flexlora,
    served_flora,
    served_hetlora,
    served_local,
    served_rolora,
    weights_of,
)
from sfedlora.lora.base_delta import advance_deltas, select_deltas
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.layer import LoraLinear
from sfedlora.methods import Method, aggregate, client_factors, make_method
from sfedlora.methods.base import Weighting
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Tensors, Update, factor_name, part_of, select_parts
from support.tiny_models import tiny_bert_classifier, tiny_gpt2, tiny_llama

__all__ = [
    "ALPHA",
    "CASES",
    "EVERYBODY",
    "EXAMPLES",
    "LAYOUTS",
    "RANK",
    "RANKS",
    "ROUND",
    "ROWS",
    "RULES",
    "Case",
    "Row",
    "Scene",
    "close",
    "copied",
    "draw",
    "make_scene",
    "measured_deltas",
    "module_of",
    "same_bits",
    "same_state",
    "snapshot",
    "with_zero_b",
]

RANK, ALPHA, ROUND = 3, 5.1, 4
RULES = ("lora", "rslora", "sfed")
TOLERANCE = 3e-6  # of the largest entry: float32 means and products of a few ranks
EXAMPLES = {"ann": 30, "bob": 7, "cyd": 101, "dan": 13, "eve": 59}
RANKS = {"ann": 3, "bob": 1, "cyd": 5, "dan": 2, "eve": 4}
EVERYBODY, SOME = tuple(EXAMPLES), ("ann", "dan", "eve")
"""SOME reach rank 4 together: the last row of a server of rank 5 has no sender."""


@dataclass(frozen=True)
class Row:
    """What the contract needs to know of a method.

    Attributes:
        served: the dense corrections of the frozen weight that clients serve after the server step.
        exact: what `Traits.exact` must say.
        base_after: the base delta after the server step; None for a method without one.
        unequal: clients may have ranks of their own.
        clients: everybody in the federation.
        partial: the clients of a partial cohort.
        refactors: the server step keeps products, not factors: one client gets its own product back.
    """

    served: Callable[[Module], dict[str, Dense]]
    exact: str
    base_after: Callable[[Module], Dense] | None = None
    unequal: bool = False
    clients: tuple[str, ...] = EVERYBODY
    partial: tuple[str, ...] = SOME
    refactors: bool = False


ROWS = {
    "fedsa": Row(served_fedsa, "factor", unequal=True),
    "fedit": Row(served_fedit, "no"),
    "ffa": Row(served_ffa, "model"),
    "rolora": Row(served_rolora, "model"),
    "flora": Row(served_flora, "model", base_after=base_after_flora, unequal=True, refactors=True),
    "fedex": Row(served_fedex, "model", base_after=base_after_fedex),
    "flexlora": Row(served_flexlora, "truncated", unequal=True, refactors=True),
    "hetlora": Row(served_hetlora, "no", unequal=True),
    "fair": Row(served_fair, "no"),
    "local": Row(served_local, "no", unequal=True),
    "centralized": Row(served_local, "model", clients=("ann",), partial=("ann",)),
}


@dataclass(frozen=True)
class Case:
    """A method, with one rank for all clients or with ranks of their own."""

    method: str
    unequal: bool = False

    def __str__(self) -> str:
        return f"{self.method}+ranks" if self.unequal else self.method

    @property
    def row(self) -> Row:
        return ROWS[self.method]


CASES = [*(Case(name) for name in ROWS), *(Case(name, unequal=True) for name, row in ROWS.items() if row.unequal)]

LAYOUTS: dict[str, Callable[[], ResidentModel]] = {
    "linear": lambda: adapt(
        tiny_llama(), target_modules=r"model\.layers\.1\.(self_attn\.[qv]_proj|mlp\.(up|down)_proj)", rank=RANK
    ),
    "conv1d": lambda: adapt(tiny_gpt2(), target_modules=r"transformer\.h\.1\.(attn\.c_attn|mlp\.c_proj)", rank=RANK),
    "linear+head": lambda: adapt(
        tiny_bert_classifier(), target_modules=("query", "value"), rank=RANK, head_modules=("classifier",)
    ),
}


@dataclass(frozen=True)
class Scene:
    """A server before a round, and what every client holds after local training (or has held since long).

    Attributes:
        state: the server's state.
        held: client id -> its complete adapter.
        cohort: who took part.
        sizes: rank and gamma of the server and of the clients.
        base: module path -> the dense base delta of `state`; zero where there is none.
    """

    case: Case
    method: Method
    state: ServerState
    held: Mapping[str, Tensors]
    cohort: tuple[str, ...]
    sizes: LoraSizes
    base: Mapping[str, Dense] = field(default_factory=dict)

    def updates(self, examples: Mapping[str, int] = EXAMPLES) -> list[Update]:
        round_num = self.state.round_num + 1
        shared = self.method.shared_parts(round_num)
        return [
            Update(client, round_num, examples[client], select_parts(self.held[client], shared))
            for client in self.cohort
        ]

    def step(self, updates: Sequence[Update] | None = None, *, weighting: Weighting = "examples") -> ServerState:
        sent = self.updates() if updates is None else updates
        return aggregate(self.method, self.state, sent, weighting=weighting, sizes=self.sizes)

    def gives(self, state: ServerState, client: str) -> Tensors:
        """What a client gets of the shared factors of a state."""
        return client_factors(self.method, state.shared, server=self.sizes.server, client=self.sizes.of(client))

    def serving(self, state: ServerState, client: str) -> dict[str, Tensor]:
        """The shared factors and the client's own personal ones."""
        return {**self.gives(state, client), **select_parts(self.held[client], self.method.personal_parts())}


def draw(resident: ResidentModel, seed: str, dtype: torch.dtype = torch.float32, rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    shapes = resident.layout.shapes(rank)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_scene(
    case: Case,
    resident: ResidentModel,
    *,
    partial: bool = False,
    dtype: torch.dtype = torch.float32,
    round_num: int = ROUND,
    rule: str = "lora",
) -> Scene:
    method, row = make_method(case.method), case.row
    sizes = _sizes(rule, unequal=case.unequal)
    before = draw(resident, "server", dtype, sizes.server.rank)
    if method.traits.restarts:
        before |= {name: torch.zeros_like(b) for name, b in select_parts(before, [Part.B]).items()}
    trained = method.trained_parts(round_num)
    held = {
        client: {**before, **select_parts(draw(resident, f"{case}/{client}", dtype, sizes.of(client).rank), trained)}
        for client in row.clients
    }
    shared = select_parts(before, frozenset(Part) - method.personal_parts())
    extra, base = _earlier_rounds(resident, dtype) if row.base_after else ({}, _no_base(resident))
    state = ServerState(round_num - 1, shared, extra)
    return Scene(case, method, state, held, row.partial if partial else row.clients, sizes, base)


def _sizes(rule: str, *, unequal: bool) -> LoraSizes:
    ranks = RANKS if unequal else {}
    sizes = {
        rank: LoraSize(rank, gamma_of(rule, alpha=ALPHA, rank=rank, num_clients=len(EVERYBODY)))
        for rank in {RANK, *ranks.values()}
    }
    return LoraSizes(sizes[max(ranks.values(), default=RANK)], {client: sizes[rank] for client, rank in ranks.items()})


def _no_base(resident: ResidentModel) -> dict[str, Dense]:
    return {target.path: np.zeros((target.out_features, target.in_features)) for target in resident.layout.targets}


def _earlier_rounds(resident: ResidentModel, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Dense]]:
    """Base deltas of two earlier rounds, in both pieces, and their dense sum. The first module missed the last one."""
    extra: dict[str, Tensor] = {}
    base = _no_base(resident)
    wide = torch.promote_types(dtype, torch.float32)
    for number, rank in enumerate((3, 2)):
        drawn = draw(resident, f"earlier {number}", wide, rank)
        products = {
            target.path: (drawn[factor_name(Part.B, target.path)], drawn[factor_name(Part.A, target.path)])
            for target in resident.layout.targets[number:]
        }
        extra = advance_deltas(extra, products)
        for path, (left, right) in products.items():
            base[path] = base[path] + left.double().numpy() @ right.double().numpy()
    return extra, base


def module_of(scene: Scene, path: str, weighting: str = "examples") -> Module:
    """A module of a scene, as the oracle sees it."""
    a, b = factor_name(Part.A, path), factor_name(Part.B, path)
    held = {client: Held(own[a].double().numpy(), own[b].double().numpy()) for client, own in scene.held.items()}
    p = weights_of({client: EXAMPLES[client] for client in scene.cohort}, weighting)
    s = {client: scene.sizes.of(client).scaling for client in scene.held}
    rank, in_features = scene.sizes.server.rank, held[scene.cohort[0]].a.shape[1]
    server_a = scene.state.shared[a].double().numpy() if a in scene.state.shared else np.zeros((rank, in_features))
    return Module(held, p, s, server_a, scene.base[path])


def measured_deltas(
    resident: ResidentModel, adapter: Tensors, size: LoraSize, state: ServerState | None = None
) -> dict[str, Dense]:
    """Module path -> correction of the weight (out, in), as the adapted module itself applies it to the identity.

    Args:
        resident: the model.
        adapter: complete.
        size: its rank and gamma.
        state: whose base deltas are applied too; None for none.
    """
    resident.serve(adapter, size=size, base_deltas=select_deltas(state.extra) if state else {})
    deltas = {}
    for target in resident.layout.targets:
        layer = resident.model.get_submodule(target.path)
        assert isinstance(layer, LoraLinear)
        identity = torch.eye(target.in_features)
        with torch.no_grad():
            both, zero = layer(identity).double(), layer.base(identity).double()
        deltas[target.path] = (both - zero).T.numpy()
    return deltas


def with_zero_b(scene: Scene, clients: Sequence[str]) -> Scene:
    def zeroed(own: Tensors) -> dict[str, Tensor]:
        return {name: torch.zeros_like(t) if part_of(name) is Part.B else t for name, t in own.items()}

    return replace(
        scene, held={client: zeroed(own) if client in clients else own for client, own in scene.held.items()}
    )


def close(actual: Dense, expected: Dense) -> bool:
    # The layer adds the delta to the base output in float32 before it is taken off again, hence the floor.
    return bool(np.abs(actual - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1.0))


def same_bits(left: Tensors, right: Tensors) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].contiguous().view(torch.uint8).equal(right[name].contiguous().view(torch.uint8))
        for name in left
    )


def same_state(left: ServerState, right: ServerState) -> bool:
    return (
        left.round_num == right.round_num
        and same_bits(left.shared, right.shared)
        and same_bits(left.extra, right.extra)
    )


def copied(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def snapshot(state: ServerState) -> ServerState:
    """A deep copy."""
    return ServerState(state.round_num, copied(state.shared), copied(state.extra))
