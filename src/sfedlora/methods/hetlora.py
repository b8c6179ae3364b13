"""HetLoRA: average A and B, weighted by the size of each client's product.

Yae Jee Cho, Luyang Liu, Zheng Xu, Aldi Fahrezi, Gauri Joshi. *Heterogeneous LoRA for Federated Fine-tuning of On-Device
Foundation Models.* arXiv:2401.06432.

    client   (A_k, B_k) <- K local steps from the first r_k rows of A and columns of B
    server   w_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F,  A = sum_k w_k pad(A_k),  B = sum_k w_k pad(B_k)

pad adds zeros up to the largest rank of the federation.

A is the factors `a:*`, B the factors `b:*`. The weights w_k are taken per target module and replace p_k
(`Contribution.weight`), so `rounds.weighting` reaches only the head, and modules in which every product is zero
(all B still zero), which fall back to p_k. Inexact: B A is not the mean of the products.

With ranks of their own, clients that did not change still change the result: what a small client does not hold counts
as zero in the mean.

Deviations: rows of A above the largest rank of the cohort stay as they were, where the padded mean would be zero; B is
zero there, so no product changes, and zeros in both would never train again. The paper's optional self-pruning of a
client's rank during training is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sfedlora.lora.algebra import weighted_mean
from sfedlora.lora.low_rank import product_norm
from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_parts, module_factors, padded
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["HetLoRA"]


@dataclass(frozen=True)
class HetLoRA:
    """Both factors are averaged; clients whose adapter is larger count for more."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "hetlora"
    traits: ClassVar[Traits] = Traits(exact="no", is_mean=False, heterogeneous_ranks=True)

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
        """A = sum_k w_k pad(A_k), B = sum_k w_k pad(B_k), module by module; the head by p_k."""
        shared = {**state.shared, **mean_of_parts(contributions, [Part.HEAD])}
        for name_a, name_b in module_factors(state.shared):
            mean = _module_mean(contributions, name_a, name_b)
            reached = mean[name_a].shape[0]
            shared[name_a] = torch.cat([mean[name_a], state.shared[name_a][reached:]])
            shared[name_b] = padded(name_b, mean[name_b], size.rank)
        return replace(state, shared=shared)


def _module_mean(contributions: Sequence[Contribution], name_a: str, name_b: str) -> dict[str, Tensor]:
    """A and B of one module at the cohort's largest rank, weighted by ||B_k A_k||_F; by p_k where all are zero."""
    rank = max(item.tensors[name_a].shape[0] for item in contributions)
    norms = [product_norm(item.tensors[name_b], item.tensors[name_a]) for item in contributions]
    total = sum(norms)
    weights = [norm / total for norm in norms] if total > 0 else [item.weight for item in contributions]
    return weighted_mean(
        (weight, {name: padded(name, item.tensors[name], rank) for name in (name_a, name_b)})
        for weight, item in zip(weights, contributions, strict=True)
    )
