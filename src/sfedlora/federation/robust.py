"""Server steps that a few hostile clients cannot steer: coordinate median, trimmed mean, Krum.

Dong Yin et al. *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates.* ICML 2018, arXiv:1803.01498
(median and trimmed mean). Peva Blanchard et al. *Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent.* NeurIPS 2017, arXiv:1703.02757 (Krum). With m updates, f of them hostile at most (`num_attackers`):

    median          of every entry
    trimmed_mean    of every entry: the mean without its f smallest and f largest values      m >= 2 f + 1
    krum            the one update whose m - f - 2 nearest others are nearest; or the           m >= 2 f + 3
                    `num_taken` best of these (Multi-Krum), in the method's own server step

Median and trimmed mean commute with a shift, so those of the factors are the broadcast plus those of their changes.
They are for rounds that share one factor: with two, A and B of the result would each be robust, but their product could
lie outside of all that was sent. Krum takes the distance of what the updates do to the weights: with both factors
||s_i B_i A_i - s_j B_j A_j||_F over all modules, by traces of (rank, rank) products; with one factor, and for a
classification head, that of the tensors themselves. The squares of all add up.

Every update counts the same, whatever number of examples it states. Updates are read factor by factor: of all clients
one factor (Krum: one module's) is in memory, besides the work space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.errors import RunError
from sfedlora.types import LoraSizes, Part, Tensors, Update, factor_name, part_of, path_of

__all__ = ["RobustRule", "fewest_updates", "krum", "robust_mean", "squared_distances"]

BLOCK_VALUES = 1 << 22
"""Values, of all updates together, that are sorted at once."""


@dataclass(frozen=True)
class RobustRule:
    """One rule.

    Attributes:
        name: which.
        num_attackers: f, of the updates of a round; not used by the median.
        num_taken: updates that Krum takes; of a round with fewer than this and f together, all but f.
    """

    name: Literal["median", "trimmed_mean", "krum"]
    num_attackers: int = 0
    num_taken: int = 1


def fewest_updates(rule: RobustRule) -> int:
    """How many updates a round needs."""
    if rule.name == "median":
        return 1
    return 2 * rule.num_attackers + (1 if rule.name == "trimmed_mean" else 3)


def robust_mean(rule: RobustRule, before: Tensors, updates: Sequence[Update]) -> dict[str, Tensor]:
    """Median or trimmed mean of every entry of the factors that were sent.

    Args:
        rule: median or trimmed_mean.
        before: the factors as they were broadcast; they name what was sent, and its dtypes.
        updates: all with the same factors, of one rank; in any order, not changed.

    Returns:
        New tensors under the names of `before`.

    Raises:
        RunError: fewer updates than the rule needs.
    """
    _require_enough(rule, updates)
    return {
        name: _robust_factor(rule, old, [update.tensors[name] for update in updates]) for name, old in before.items()
    }


def krum(rule: RobustRule, before: Tensors, updates: Sequence[Update], sizes: LoraSizes) -> list[Update]:
    """The updates that are nearest to their neighbours, by client id; of two as near, the first of these is nearer.

    Args:
        rule: krum.
        before: the factors as they were broadcast.
        updates: all with the same factors; in any order, not changed.
        sizes: gamma of every client.

    Raises:
        RunError: fewer updates than the rule needs.
    """
    _require_enough(rule, updates)
    ordered = sorted(updates, key=lambda update: update.client_id)
    distances = squared_distances(before, ordered, sizes)
    num_near = len(ordered) - rule.num_attackers - 2
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, :num_near].sum(axis=1)
    num_taken = min(rule.num_taken, len(ordered) - rule.num_attackers)
    return [ordered[at] for at in sorted(np.argsort(scores, kind="stable")[:num_taken])]


def squared_distances(before: Tensors, updates: Sequence[Update], sizes: LoraSizes) -> NDArray[np.float64]:
    """(m, m) squared distances of what the updates do to the weights, in the order given."""
    total = np.zeros((len(updates), len(updates)))
    for gram in _grams(before, updates, sizes):
        squares = np.diag(gram)
        total += np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)
    return total


def _grams(before: Tensors, updates: Sequence[Update], sizes: LoraSizes) -> Iterator[NDArray[np.float64]]:
    """Inner products of the updates, (m, m), of one module or tensor after the other."""
    for name in sorted(before):
        a, b = (factor_name(part, path_of(name)) for part in (Part.A, Part.B))
        if part_of(name) is Part.B and a in before:
            continue  # it goes with its A
        if part_of(name) is Part.A and b in before:
            scalings = [sizes.of(update.client_id).scaling for update in updates]
            yield _product_gram(
                [_wide(u.tensors[a]) for u in updates], [_wide(u.tensors[b]) for u in updates], scalings
            )
        else:
            # Of the changes, whose differences are not small beside them. Not about the updates' own mean: a hostile
            # one could move it so far that rounding hides how the others lie.
            old = _wide(before[name]).ravel()
            rows = np.stack([_wide(update.tensors[name]).ravel() - old for update in updates])
            yield rows @ rows.T


def _product_gram(
    a: Sequence[NDArray[np.float64]], b: Sequence[NDArray[np.float64]], scalings: Sequence[float]
) -> NDArray[np.float64]:
    """<s_i B_i A_i, s_j B_j A_j>_F = s_i s_j tr((B_i^T B_j) (A_j A_i^T))."""
    gram = np.empty((len(a), len(a)))
    for i in range(len(a)):
        for j in range(i + 1):
            value = scalings[i] * scalings[j] * float(np.sum((b[i].T @ b[j]) * (a[i] @ a[j].T)))
            gram[i, j] = gram[j, i] = value
    return gram


def _robust_factor(rule: RobustRule, before: Tensor, sent: Sequence[Tensor]) -> Tensor:
    result = torch.empty_like(before, memory_format=torch.contiguous_format)
    flat, rows = result.view(-1), [tensor.detach().reshape(-1) for tensor in sent]
    wide = torch.promote_types(before.dtype, torch.float32)
    step = max(1, BLOCK_VALUES // len(rows))
    for start in range(0, flat.numel(), step):
        block = slice(start, start + step)
        values = torch.stack([row[block].to(wide) for row in rows]).sort(dim=0).values
        flat[block] = _middle(rule, values).to(before.dtype)
    return result


def _middle(rule: RobustRule, ordered: Tensor) -> Tensor:
    """(m, n) ascending in every column -> (n,)."""
    count = len(ordered)
    if rule.name == "median":
        return ordered[(count - 1) // 2] / 2 + ordered[count // 2] / 2
    return ordered[rule.num_attackers : count - rule.num_attackers].double().mean(dim=0)


def _wide(tensor: Tensor) -> NDArray[np.float64]:
    wide: NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    return wide


def _require_enough(rule: RobustRule, updates: Sequence[Update]) -> None:
    needed = fewest_updates(rule)
    if len(updates) < needed:
        raise RunError(
            f"robust: {rule.name} against {rule.num_attackers} attackers needs at least {needed} updates, "
            f"{len(updates)} are left; raise rounds.cohort_size or lower robust_attackers"
        )
