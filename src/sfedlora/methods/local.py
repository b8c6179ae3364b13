"""Every client alone: what federation has to beat.

No factor travels; client k trains (A_k, B_k) and its head on its own data in every round it is sampled for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["Local"]


@dataclass(frozen=True)
class Local:
    """Everything is personal."""

    head: HeadPlacement = "personal"
    name: ClassVar[str] = "local"
    traits: ClassVar[Traits] = Traits(exact="no", is_mean=False, averages_a=False, heterogeneous_ranks=True)

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """A, B and the head, in every round."""
        del round_num
        return ALL_PARTS

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """Nothing."""
        del round_num
        return frozenset()

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """Nothing."""
        del is_current
        return self.shared_parts(round_num)

    def personal_parts(self) -> frozenset[Part]:
        """A, B and the head."""
        return ALL_PARTS

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """Nothing to do."""
        del contributions, size
        return state
