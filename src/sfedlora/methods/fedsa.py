"""FedSA-LoRA: share A, keep B.

Pengxin Guo, Shuang Zeng, Yanran Wang, Huijie Fan, Feifei Wang, Liangqiong Qu. *Selective Aggregation for Low-Rank
Adaptation in Federated Learning.* arXiv:2410.01463. SFed-LoRA (arXiv:2603.08058) is this
method with the `sfed` scaling.

    client   (A_k, B_k) <- K local steps from (A, own B_k)
    server   A = sum_k p_k A_k

A is the factors `a:*`, B_k the factors `b:*` of client k, p_k `Contribution.weight`. Client k serves W0 + s B_k A.
The mean of one factor is exact; each client's own model still moves from B_k A_k to B_k A.

Ranks may differ (not in the paper): client k trains the first r_k rows of A, and every row is averaged over the clients
that sent it, with their weights scaled to add up to 1. A row that nobody sent stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_rows
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["FedSA"]


@dataclass(frozen=True)
class FedSA:
    """A is averaged; B, and by default a classification head, never leave the client."""

    head: HeadPlacement = "personal"
    name: ClassVar[str] = "fedsa"
    traits: ClassVar[Traits] = Traits(exact="factor", heterogeneous_ranks=True)

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """A, B and the head, in every round."""
        del round_num
        return ALL_PARTS

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """A, and the head where it is shared."""
        del round_num
        return ALL_PARTS - self.personal_parts()

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """What is shared."""
        del is_current
        return self.shared_parts(round_num)

    def personal_parts(self) -> frozenset[Part]:
        """B, and the head where it is personal."""
        return frozenset({Part.B, Part.HEAD}) if self.head == "personal" else frozenset({Part.B})

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """A = sum_k p_k A_k, row by row."""
        del size
        return mean_of_rows(state, contributions)
