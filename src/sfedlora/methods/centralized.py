"""One participant with all clients' training data: the ceiling.

Not a federation: it shows what the same number of steps reaches when the data may be pooled. The participant takes, in
one round, as many optimizer steps as the cohort of a federated round takes together, with the same batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_shared
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["Centralized"]


@dataclass(frozen=True)
class Centralized:
    """All factors are trained on the pooled data; every client is evaluated with the result."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "centralized"
    traits: ClassVar[Traits] = Traits(exact="model", averages_a=False, pools_data=True)

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """A, B and the head, in every round."""
        del round_num
        return ALL_PARTS

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """All of them: the one participant's factors become the state."""
        del round_num
        return ALL_PARTS

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """All of them."""
        del is_current
        return self.shared_parts(round_num)

    def personal_parts(self) -> frozenset[Part]:
        """Nothing."""
        return frozenset()

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """The one participant's factors."""
        del size
        return mean_of_shared(state, contributions)
