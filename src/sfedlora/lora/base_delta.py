"""The base delta: a correction D of the frozen weights that all clients share, W = W0 + D, kept as factors.

Methods that aggregate exactly (`fedex`, `flora`) give every target module such a delta; it grows by a product
`left @ right` in every round. Products are concatenated, not multiplied, until the factors of a module hold at least as
many numbers as its weight:

    factors (out, R), (R, in)   while R * (in + out) < in * out
    one (out, in) matrix        from there on

Up to that rank the factors are smaller to keep and to send, and cost less per token than the module itself; beyond it
the matrix is, in all three. Everything is float32 (float64 for float64 factors).

In `ServerState.extra` the delta is kept in two pieces, so that a client that received the broadcast before needs only
the last one: `delta` is the sum up to the round before the last, `fresh` what the last round added. Names are
`<piece>_left:<path>` with `<piece>_right:<path>`, or `<piece>_full:<path>`.

Not here: which products a method adds (`methods`), how a layer applies them (`layer`), checkpoints (`artifacts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sfedlora.types import AdapterLayout, Part, Tensors, factor_name

__all__ = [
    "BaseDelta",
    "adapter_with_deltas",
    "advance_deltas",
    "broadcast_deltas",
    "select_deltas",
    "total_deltas",
]

_OLD, _FRESH = "delta", "fresh"
_LEFT, _RIGHT, _FULL = "left", "right", "full"


@dataclass(frozen=True)
class BaseDelta:
    """The correction of one module's weight.

    Attributes:
        left: (out, R), or the whole correction (out, in).
        right: (R, in); None where `left` is the whole correction.
    """

    left: Tensor
    right: Tensor | None

    @property
    def rank(self) -> int:
        """R of the factors; of a whole matrix min(out, in), the largest rank that it can have."""
        return min(self.left.shape) if self.right is None else self.left.shape[1]

    def matrix(self) -> Tensor:
        """The correction, (out, in)."""
        return self.left if self.right is None else self.left @ self.right


def select_deltas(extra: Tensors) -> dict[str, Tensor]:
    """The tensors of `ServerState.extra` that hold base deltas."""
    return {name: tensor for name, tensor in extra.items() if _piece_of(name) is not None}


def broadcast_deltas(extra: Tensors, *, is_current: bool) -> dict[str, Tensor]:
    """The delta tensors that a client needs: all of them, or the last piece if it had the broadcast before."""
    wanted = {_FRESH} if is_current else {_OLD, _FRESH}
    return {name: tensor for name, tensor in extra.items() if _piece_of(name) in wanted}


def total_deltas(extra: Tensors) -> dict[str, BaseDelta]:
    """Module path -> its whole delta, both pieces together."""
    total = _read(extra, _OLD)
    for path, fresh in _read(extra, _FRESH).items():
        total[path] = _add(total[path], fresh) if path in total else _compact(fresh)
    return total


def advance_deltas(extra: Tensors, products: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What `extra` becomes when a round adds `left @ right` to some modules; other entries stay.

    Args:
        extra: before the round; not changed.
        products: module path -> left (out, R) and right (R, in); R may be 0.
    """
    others = {name: tensor for name, tensor in extra.items() if _piece_of(name) is None}
    for path, delta in total_deltas(extra).items():
        others |= _names(_OLD, path, delta)
    for path, (left, right) in products.items():
        if left.shape[1] > 0:
            others |= _names(_FRESH, path, _compact(BaseDelta(left, right)))
    return others


def adapter_with_deltas(
    tensors: Tensors, deltas: Mapping[str, BaseDelta], layout: AdapterLayout, scaling: float
) -> tuple[dict[str, Tensor], int]:
    """One adapter of gamma 1 that does what an adapter of some gamma does on top of base deltas.

        [gamma B, left] @ [A; right] = gamma B A + left @ right

    A whole matrix is multiplied by an identity. Modules of lower rank are padded with zeros, so that one rank serves
    all of them.

    Args:
        tensors: a complete adapter.
        deltas: the base deltas by module path.
        layout: its targets.
        scaling: gamma of the adapter.

    Returns:
        The factors, head included, and their rank.
    """
    rank = max(tensors[factor_name(Part.A, target.path)].shape[0] for target in layout.targets)
    rank += max((delta.rank for delta in deltas.values()), default=0)
    joined = dict(tensors)
    for target in layout.targets:
        name_a, name_b = factor_name(Part.A, target.path), factor_name(Part.B, target.path)
        rows, columns = [tensors[name_a].float()], [tensors[name_b].float() * scaling]
        if target.path in deltas:
            left, right = _factors(deltas[target.path])
            rows.append(right)
            columns.append(left)
        missing = rank - sum(row.shape[0] for row in rows)
        rows.append(torch.zeros(missing, target.in_features))
        columns.append(torch.zeros(target.out_features, missing))
        joined |= {name_a: torch.cat(rows), name_b: torch.cat(columns, dim=1)}
    return joined, rank


def _factors(delta: BaseDelta) -> tuple[Tensor, Tensor]:
    if delta.right is not None:
        return delta.left, delta.right
    out_features, in_features = delta.left.shape
    if in_features <= out_features:
        return delta.left, torch.eye(in_features)
    return torch.eye(out_features), delta.left


def _add(one: BaseDelta, other: BaseDelta) -> BaseDelta:
    """The sum of two deltas, as factors if that is smaller."""
    if one.right is None or other.right is None:
        return BaseDelta(one.matrix() + other.matrix(), None)
    return _compact(BaseDelta(torch.cat([one.left, other.left], dim=1), torch.cat([one.right, other.right])))


def _compact(delta: BaseDelta) -> BaseDelta:
    """The matrix, where factors hold at least as many numbers."""
    if delta.right is None or delta.left.numel() + delta.right.numel() < delta.left.shape[0] * delta.right.shape[1]:
        return delta
    return BaseDelta(delta.matrix(), None)


def _piece_of(name: str) -> str | None:
    """`delta` or `fresh` for the name of a delta tensor, None for any other."""
    kind = name.split(":", 1)[0]
    piece, _, form = kind.partition("_")
    return piece if piece in (_OLD, _FRESH) and form in (_LEFT, _RIGHT, _FULL) else None


def _read(extra: Tensors, piece: str) -> dict[str, BaseDelta]:
    deltas: dict[str, BaseDelta] = {}
    for name, tensor in extra.items():
        kind, _, path = name.partition(":")
        if kind == f"{piece}_{_FULL}":
            deltas[path] = BaseDelta(tensor, None)
        elif kind == f"{piece}_{_LEFT}":
            deltas[path] = BaseDelta(tensor, extra[f"{piece}_{_RIGHT}:{path}"])
    return deltas


def _names(piece: str, path: str, delta: BaseDelta) -> dict[str, Tensor]:
    if delta.right is None:
        return {f"{piece}_{_FULL}:{path}": delta.left}
    return {f"{piece}_{_LEFT}:{path}": delta.left, f"{piece}_{_RIGHT}:{path}": delta.right}
