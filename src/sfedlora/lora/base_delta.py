"""The base delta: a correction D of the frozen weights that all clients share, W = W0 + D, kept as factors.

Methods that aggregate exactly (`fedex`, `flora`) give every target module such a delta; it grows by a product
`left @ right` in every round. Products are concatenated, not multiplied, until the factors of a module hold at least as
many numbers as its weight:

    factors (out, R), (R, in)   while R * (in + out) < in * out
    one (out, in) matrix        from there on

Up to that rank the factors are smaller to keep and to send, and cost less per token than the module itself; beyond it
the matrix is, in all three. Everything is float32 (float64 for float64 factors).

In `ServerState.extra` the delta is kept in pieces, one per round, so that a client that received the broadcast before
needs only the last one, and a server step copies none of the others: `fresh` is what the last round added, `delta`,
`delta2`, `delta3` ... what the rounds before did, until a module's pieces become one matrix `delta`. Names are
`<piece>_left:<path>` with `<piece>_right:<path>`, or `<piece>_full:<path>`.

Not here: which products a method adds (`methods`), how a layer applies them (`layer`), checkpoints (`artifacts`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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

FRESH = math.inf
"""The number of the last round's piece; those of earlier rounds are 1, 2, 3, ..."""
_NAME = re.compile(r"(?P<piece>fresh|delta(?P<number>[2-9]|[1-9][0-9]+)?)_(?P<form>left|right|full):")


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
    return {name: tensor for name, tensor in select_deltas(extra).items() if not is_current or _piece_of(name) == FRESH}


def total_deltas(extra: Tensors) -> dict[str, BaseDelta]:
    """Module path -> its whole delta, all pieces together."""
    return {path: _sum(list(pieces.values())) for path, pieces in _pieces(extra).items()}


def advance_deltas(extra: Tensors, products: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What `extra` becomes when a round adds `left @ right` to some modules; other entries stay.

    Args:
        extra: before the round; not changed.
        products: module path -> left (out, R) and right (R, in); R may be 0.
    """
    advanced = {name: tensor for name, tensor in extra.items() if _piece_of(name) is None}
    for path, by_number in _pieces(extra).items():
        pieces = list(by_number.values())
        if _outgrow_the_matrix(pieces):
            pieces = [_sum(pieces)]
        for number, piece in enumerate(pieces, start=1):
            advanced |= _names("delta" if number == 1 else f"delta{number}", path, piece)
    for path, (left, right) in products.items():
        if left.shape[1] > 0:
            advanced |= _names("fresh", path, _compact(BaseDelta(left, right)))
    return advanced


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


def _sum(pieces: Sequence[BaseDelta]) -> BaseDelta:
    """The sum of a module's pieces, as factors if that is smaller."""
    if all(piece.right is not None for piece in pieces):
        left = torch.cat([piece.left for piece in pieces], dim=1) if len(pieces) > 1 else pieces[0].left
        rights = [piece.right for piece in pieces if piece.right is not None]
        return _compact(BaseDelta(left, torch.cat(rights) if len(rights) > 1 else rights[0]))
    total = pieces[0].matrix()
    for piece in pieces[1:]:
        total = total + piece.matrix()
    return BaseDelta(total, None)


def _outgrow_the_matrix(pieces: Sequence[BaseDelta]) -> bool:
    """Whether one of several pieces is a matrix, or their factors together hold at least as many numbers as one."""
    last = pieces[-1]
    if len(pieces) == 1 or last.right is None:
        return len(pieces) > 1
    numbers = sum(piece.left.numel() + (0 if piece.right is None else piece.right.numel()) for piece in pieces)
    return pieces[0].right is None or numbers >= last.left.shape[0] * last.right.shape[1]


def _compact(delta: BaseDelta) -> BaseDelta:
    """The matrix, where factors hold at least as many numbers."""
    if delta.right is None or delta.left.numel() + delta.right.numel() < delta.left.shape[0] * delta.right.shape[1]:
        return delta
    return BaseDelta(delta.matrix(), None)


def _piece_of(name: str) -> float | None:
    """The number of the piece that a delta tensor belongs to, FRESH for the last one; None for any other name."""
    matched = _NAME.match(name)
    if matched is None:
        return None
    return FRESH if matched["piece"] == "fresh" else float(matched["number"] or 1)


def _pieces(extra: Tensors) -> dict[str, dict[float, BaseDelta]]:
    """Module path -> its pieces by number, from the first round to the last."""
    found: dict[str, dict[float, BaseDelta]] = {}
    for name, tensor in extra.items():
        matched, number = _NAME.match(name), _piece_of(name)
        if matched is None or number is None or matched["form"] == "right":
            continue
        path = name[matched.end() :]
        right = None if matched["form"] == "full" else extra[f"{matched['piece']}_right:{path}"]
        found.setdefault(path, {})[number] = BaseDelta(tensor, right)
    return {path: dict(sorted(pieces.items())) for path, pieces in found.items()}


def _names(piece: str, path: str, delta: BaseDelta) -> dict[str, Tensor]:
    if delta.right is None:
        return {f"{piece}_full:{path}": delta.left}
    return {f"{piece}_left:{path}": delta.left, f"{piece}_right:{path}": delta.right}
