"""FlexLoRA: average the products, cut the mean to the rank by SVD.

Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao, Yaliang Li. *Federated Fine-tuning of Large Language Models under
Heterogeneous Tasks and Client Resources.* arXiv:2402.11505.

    client   (A_k, B_k) <- K local steps from A = V_{r_k}^T, B = U_{r_k} S_{r_k} / s_k
    server   sum_k p_k s_k B_k A_k = U S V^T

A is the factors `a:*`, B the factors `b:*`, p_k `Contribution.weight`, s_k `Contribution.scaling`, r_k the rank of
client k. The server keeps the cut at the largest rank, with its gamma; `client_factors` cuts it further and rescales B
for a client of another rank. The product is the best of its rank; the sum itself has up to sum_k r_k of them. The
(out, in) sum is never formed: it is the product of the columns p_k s_k B_k and the rows A_k.

Deviations and limits: one client gets its own product back, not its own factors. With ranks of their own, clients that
did not change still change the result: what a small client's cut lacks counts as zero in the mean. If a cohort's ranks
do not add up to the largest rank, A keeps its former rows beyond that sum, with B zero there: zeros in both would never
train again. A has orthonormal rows after round 1, whatever the scaling rule assumed of its variance, so `sfed` with a
count of clients is refused (`config`), and so are server optimizers: the change of a factor is no direction of descent
when every round chooses new coordinates. Ranks above min(in, out) have no SVD to be cut from and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sfedlora.lora.low_rank import truncated_svd
from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_parts, module_factors, padded
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["FlexLoRA"]


@dataclass(frozen=True)
class FlexLoRA:
    """Both factors are sent; both come back from the SVD of the mean product."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "flexlora"
    traits: ClassVar[Traits] = Traits(
        exact="truncated",
        is_mean=False,
        heterogeneous_ranks=True,
        keeps_products=True,
        caps_rank=True,
        server_optimizers=False,
    )

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
        """A = V_r^T, B = U_r S_r / s of the mean product, module by module; the head by p_k."""
        shared = {**state.shared, **mean_of_parts(contributions, [Part.HEAD])}
        for name_a, name_b in module_factors(state.shared):
            a, b = _refactored(contributions, name_a, name_b, size=size)
            shared[name_a] = torch.cat([a, state.shared[name_a][a.shape[0] :]])
            shared[name_b] = padded(name_b, b, size.rank)
        return replace(state, shared=shared)


def _refactored(
    contributions: Sequence[Contribution], name_a: str, name_b: str, *, size: LoraSize
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product, times gamma, is the mean product cut to r <= the server's rank."""
    first = contributions[0].tensors[name_a]
    wide = torch.promote_types(first.dtype, torch.float32)
    shares = [item.weight * (item.scaling / size.scaling) for item in contributions]
    scaled = [item.tensors[name_b].to(wide) * share for item, share in zip(contributions, shares, strict=True)]
    left, right = torch.cat(scaled, dim=1), torch.cat([item.tensors[name_a].to(wide) for item in contributions])
    svd = truncated_svd(left, right, min(size.rank, right.shape[0]))
    return svd.vt.to(first.dtype), (svd.u * svd.singular).to(first.dtype)
