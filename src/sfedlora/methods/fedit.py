"""FedIT: average A and B.

Jianyi Zhang et al. *Towards Building the Federated GPT: Federated Instruction Tuning.* arXiv:2305.05644.

    client   (A_k, B_k) <- K local steps from (A, B)
    server   A = sum_k p_k A_k,  B = sum_k p_k B_k

Inexact: B A is not sum_k p_k B_k A_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_shared
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["FedIT"]


@dataclass(frozen=True)
class FedIT:
    """Both factors are averaged; every client ends with the same model."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "fedit"
    traits: ClassVar[Traits] = Traits(exact="no")

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
        """A = sum_k p_k A_k, B = sum_k p_k B_k."""
        del size
        return mean_of_shared(state, contributions)
