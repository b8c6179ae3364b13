"""FLoRA: stack the clients' factors, add the product to the frozen weights, begin again with fresh adapters.

Ziyao Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu, Ang Li. *FLoRA: Federated Fine-Tuning Large
Language Models with Heterogeneous Low-Rank Adaptations.* arXiv:2409.05976.

    client   A_k drawn anew, B_k = 0;  (A_k, B_k) <- K local steps on W
    server   A_s = rows [p_1 s_1 A_1; ...; p_m s_m A_m],  B_s = columns [B_1, ..., B_m],  W = W + B_s A_s

A is the factors `a:*`, B the factors `b:*`, p_k `Contribution.weight`, s_k `Contribution.scaling`. Exact: B_s A_s is
sum_k p_k s_k B_k A_k, whatever the ranks; the stack has the sum of the ranks. It is kept and sent as these factors
(`lora.base_delta`). After the step the shared B is zero: what a client serves is W alone.

A is never averaged, so `sfed` counts one client and equals `rslora`. The draws of a round come from the run's seed on
both sides and are not sent; all clients draw the same A, of which a client of rank r_k takes the first r_k rows.

Deviations: none known. Server optimizers are refused: no factor outlives a round.
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
    mean_of_parts,
    module_factors,
)
from sfedlora.types import LoraSize, Part, ServerState, path_of

__all__ = ["FLoRA"]


@dataclass(frozen=True)
class FLoRA:
    """All clients' products go into the base delta; adapters live for one round."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "flora"
    traits: ClassVar[Traits] = Traits(
        exact="model",
        is_mean=False,
        averages_a=False,
        heterogeneous_ranks=True,
        server_optimizers=False,
        restarts=True,
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
        """The head where it is shared; base deltas go with every broadcast, fresh adapters come from the seed."""
        del round_num, is_current
        return frozenset({Part.HEAD}) - self.personal_parts()

    def personal_parts(self) -> frozenset[Part]:
        """Nothing, or the head where it is personal."""
        return frozenset({Part.HEAD}) if self.head == "personal" else frozenset()

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """The stacked product added to the base delta; the head by p_k; B zero."""
        del size
        stacks = {
            path_of(name_a): _stacked(contributions, name_a, name_b) for name_a, name_b in module_factors(state.shared)
        }
        zeros = {name_b: torch.zeros_like(state.shared[name_b]) for _, name_b in module_factors(state.shared)}
        shared = {**state.shared, **zeros, **mean_of_parts(contributions, [Part.HEAD])}
        return replace(state, shared=shared, extra=advance_deltas(state.extra, stacks))


def _stacked(contributions: Sequence[Contribution], name_a: str, name_b: str) -> tuple[Tensor, Tensor]:
    """B_s (out, sum of ranks) and A_s (sum of ranks, in)."""
    wide = torch.promote_types(contributions[0].tensors[name_a].dtype, torch.float32)
    columns = [item.tensors[name_b].to(wide) for item in contributions]
    rows = [item.tensors[name_a].to(wide) * (item.weight * item.scaling) for item in contributions]
    return torch.cat(columns, dim=1), torch.cat(rows)
