"""FedEx-LoRA: average A and B, and put what that loses of the mean product into the frozen weights.

Raghav Singhal, Kaustubh Ponkshe, Praneeth Vepakomma. *FedEx-LoRA: Exact Aggregation for Federated and Efficient
Fine-Tuning of Foundation Models.* arXiv:2410.09432.

    client   (A_k, B_k) <- K local steps from (A, B) on W
    server   A = sum_k p_k A_k,  B = sum_k p_k B_k,  W = W + s (sum_k p_k B_k A_k - B A)

A is the factors `a:*`, B the factors `b:*`, p_k `Contribution.weight`, s `Contribution.scaling`, equal for all
clients. Exact: W + s B A after the step is the mean of W + s B_k A_k. The residual is kept as factors
(`lora.base_delta`) in the form

    sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)

which has rank at most m r, holds no difference of large products and is nothing at all where all clients have the same
A or the same B (one client, a round in which only one factor moved).

Deviations: the paper sends the residual as a matrix; here it travels as factors. Server optimizers are refused: the
residual belongs to the mean, not to a step along it. All clients have one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sfedlora.lora.base_delta import advance_deltas
from sfedlora.methods.base import (
    ALL_PARTS,
    Contribution,
    HeadPlacement,
    Traits,
    mean_of_shared,
    module_factors,
)
from sfedlora.types import LoraSize, Part, ServerState, Tensors, path_of

__all__ = ["FedEx"]


@dataclass(frozen=True)
class FedEx:
    """Both factors are averaged; the base delta takes up the difference to the mean product."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "fedex"
    traits: ClassVar[Traits] = Traits(exact="model", is_mean=False, server_optimizers=False)

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """A, B and the head, in every round."""
        del round_num
        return ALL_PARTS

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """A, B, and the head unless it is personal."""
        del round_num
        return ALL_PARTS - self.personal_parts()

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """What is shared."""
        del is_current
        return self.shared_parts(round_num)

    def personal_parts(self) -> frozenset[Part]:
        """Nothing, or the head where it is personal."""
        return frozenset({Part.HEAD}) if self.head == "personal" else frozenset()

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """A = sum_k p_k A_k, B = sum_k p_k B_k, and the residual added to the base delta."""
        del size
        after = mean_of_shared(state, contributions)
        residuals = {
            path_of(name_a): _residual(contributions, after.shared, name_a, name_b)
            for name_a, name_b in module_factors(after.shared)
        }
        return replace(after, extra=advance_deltas(state.extra, residuals))


def _residual(contributions: Sequence[Contribution], mean: Tensors, name_a: str, name_b: str) -> tuple[Tensor, Tensor]:
    """Columns p_k s (B_k - B) and rows A_k - A; none of either where they would be rounding errors of the mean."""
    wide = torch.promote_types(mean[name_a].dtype, torch.float32)
    a, b = mean[name_a].to(wide), mean[name_b].to(wide)
    if _agree(contributions, name_a) or _agree(contributions, name_b):
        return b[:, :0], a[:0]
    columns = [(item.tensors[name_b].to(wide) - b) * (item.weight * item.scaling) for item in contributions]
    rows = [item.tensors[name_a].to(wide) - a for item in contributions]
    return torch.cat(columns, dim=1), torch.cat(rows)


def _agree(contributions: Sequence[Contribution], name: str) -> bool:
    """Whether all clients sent the same factor."""
    first = contributions[0].tensors[name]
    return all(item.tensors[name].equal(first) for item in contributions)
