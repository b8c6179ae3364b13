"""FlexLoRA: average the products, cut the mean to the rank by SVD.

Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao, Yaliang Li. *Federated Fine-tuning of Large Language Models under
Heterogeneous Tasks and Client Resources.* arXiv:2402.11505.

    client   (A_k, B_k) <- K local steps from (A, B)
    server   sum_k p_k s B_k A_k = U S V^T,  A = V_r^T,  B = U_r S_r / s

A is the factors `a:*`, B the factors `b:*`, p_k `Contribution.weight`, r the rank. s is one number for all clients of
equal rank, so it cancels: the server decomposes sum_k p_k B_k A_k. The product is the best of rank r; the sum itself
has up to m r of them. The (out, in) sum is never formed: it is the product of the columns p_k B_k and the rows A_k.

Deviations and limits: one rank for all clients here. One client gets its own product back, not its own factors. A has
orthonormal rows after round 1, whatever the scaling rule assumed of its variance, so `sfed` with a count of clients is
refused (`config`), and so are server optimizers: the change of a factor is no direction of descent when every round
chooses new coordinates. Ranks above min(in, out) have no SVD to be cut from and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sfedlora.errors import ConfigError
from sfedlora.lora.low_rank import truncated_svd
from sfedlora.methods.base import ALL_PARTS, Contribution, Exactness, HeadPlacement, mean_of_parts
from sfedlora.types import AdapterLayout, Part, ServerState, factor_name, part_of, path_of

__all__ = ["FlexLoRA", "require_rank"]


@dataclass(frozen=True)
class FlexLoRA:
    """Both factors are sent; both come back from the SVD of the mean product."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "flexlora"
    exact: ClassVar[Exactness] = "truncated"
    averages_a: ClassVar[bool] = True
    pools_data: ClassVar[bool] = False

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

    def server_step(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """U S V^T = sum_k p_k B_k A_k cut to r;  A = V_r^T, B = U_r S_r.

        Raises:
            ConfigError: the rank is above min(in_features, out_features) of a module.
        """
        shared = {**state.shared, **mean_of_parts(contributions, [Part.HEAD])}
        for name, a in state.shared.items():
            if part_of(name) is Part.A:
                other = factor_name(Part.B, path_of(name))
                shared[name], shared[other] = _refactored(contributions, name, other, rank=a.shape[0])
        return replace(state, shared=shared)


def require_rank(layout: AdapterLayout, rank: int) -> None:
    """Refuse a rank that a module's delta weight cannot have.

    Raises:
        ConfigError: the rank is above min(in_features, out_features) of a module.
    """
    for target in layout.targets:
        limit = min(target.in_features, target.out_features)
        if rank > limit:
            raise ConfigError(
                f"lora.rank: {rank} is above min(in_features, out_features) = {limit} of {target.path}, and method "
                f"'flexlora' cuts an SVD to the rank; use at most {limit}, or other target modules"
            )


def _refactored(contributions: Sequence[Contribution], name_a: str, name_b: str, *, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is the mean product, cut to the rank."""
    first = contributions[0].tensors[name_a]
    wide = torch.promote_types(first.dtype, torch.float32)
    left = torch.cat([item.tensors[name_b].to(wide) * item.weight for item in contributions], dim=1)
    right = torch.cat([item.tensors[name_a].to(wide) for item in contributions])
    svd = truncated_svd(left, right, rank)
    return svd.vt.to(first.dtype), (svd.u * svd.singular).to(first.dtype)
