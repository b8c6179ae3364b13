"""LoRA-FAIR: average A and B, then correct B towards the mean product.

Jieming Bian, Lei Wang, Letian Zhang, Jie Xu. *LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement.* arXiv:2411.14961.

    client   (A_k, B_k) <- K local steps from (A, B)
    server   A = sum_k p_k A_k,  M = sum_k p_k B_k,  T = sum_k p_k B_k A_k,
             dB = argmin ||(M + dB) A - T||_F^2 + lambda ||dB||_F^2,  B = M + dB

A is the factors `a:*`, B the factors `b:*`, p_k `Contribution.weight`. The scaling s of equal ranks cancels.
The minimiser, with the residual T - M A = sum_k p_k (B_k - M)(A_k - A), which needs no (out, in) matrix and is exactly
zero for one client or equal clients:

    dB = [sum_k p_k (B_k - M) (A_k - A) A^T] (A A^T + lambda I)^-1
    lambda = ridge * ||A||_F^2 / r

Inexact: T has up to m r singular values.

Deviations: the paper writes the distance to T as a similarity measure to be minimised numerically. Here it is the
Frobenius norm, which has a closed form. lambda is relative to the mean squared norm of the rows of A, so that (A, B)
and (c A, B / c) end with the same product. One rank for all clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_shared, module_factors
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["LoRAFAIR"]


@dataclass(frozen=True)
class LoRAFAIR:
    """Both factors are averaged; B absorbs what it can of the error of averaging them apart.

    Attributes:
        head: where a classification head lives.
        ridge: lambda over the mean squared norm of the rows of A, above 0.
    """

    head: HeadPlacement = "shared"
    ridge: float = 0.01
    name: ClassVar[str] = "fair"
    traits: ClassVar[Traits] = Traits(exact="no", is_mean=False)

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
        """A = sum_k p_k A_k, B = sum_k p_k B_k + dB."""
        del size
        after = mean_of_shared(state, contributions)
        shared = dict(after.shared)
        for name, other in module_factors(after.shared):
            correction = _correction(contributions, after, name, other, ridge=self.ridge)
            shared[other] = (shared[other].double() + correction).to(shared[other].dtype)
        return replace(after, shared=shared)


def _correction(
    contributions: Sequence[Contribution], mean: ServerState, name_a: str, name_b: str, *, ridge: float
) -> Tensor:
    """The correction dB (out, rank), float64."""
    a, b = mean.shared[name_a].double(), mean.shared[name_b].double()
    gram = a @ a.T
    penalty = ridge * float(gram.trace()) / gram.shape[0]
    residual = torch.zeros_like(b)
    if penalty == 0:
        return residual
    for item in contributions:
        off_a, off_b = item.tensors[name_a].double() - a, item.tensors[name_b].double() - b
        residual += item.weight * (off_b @ (off_a @ a.T))
    gram.diagonal().add_(penalty)
    correction: Tensor = torch.linalg.solve(gram, residual, left=False)
    return correction
