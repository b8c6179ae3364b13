"""FFA-LoRA: A is frozen, B is averaged.

Youbang Sun, Zitao Li, Yaliang Li, Bolin Ding. *Improving LoRA in Privacy-preserving Federated Learning.*
arXiv:2403.12313.

    client   B_k <- K local steps from B; A is the same for all and never trained
    server   B = sum_k p_k B_k

Exact: s B A = sum_k p_k s B_k A. The paper orthogonalises A in a variant; here A is the run's initial A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sfedlora.methods.base import Contribution, HeadPlacement, Traits, mean_of_shared
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["FFA"]


@dataclass(frozen=True)
class FFA:
    """Only B, and the head, are trained and averaged. A comes from seeds, so it is never sent."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "ffa"
    traits: ClassVar[Traits] = Traits(exact="model")

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """B and the head, in every round."""
        del round_num
        return frozenset({Part.B, Part.HEAD})

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """B, and the head unless it is personal."""
        return self.trained_parts(round_num) - self.personal_parts()

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """What is shared."""
        del is_current
        return self.shared_parts(round_num)

    def personal_parts(self) -> frozenset[Part]:
        """Nothing, or the head where it is personal."""
        return frozenset({Part.HEAD}) if self.head == "personal" else frozenset()

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """B = sum_k p_k B_k."""
        del size
        return mean_of_shared(state, contributions)
