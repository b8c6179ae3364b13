"""RoLoRA: train and average B in odd rounds, A in even rounds.

Shuangyi Chen, Yue Ju, Hardik Dalal, Zhongwen Zhu, Ashish Khisti. *Robust Federated Finetuning of Foundation Models via
Alternating Minimization of LoRA.* arXiv:2409.02346. Continued in arXiv:2502.01755.

    odd round    client  B_k <- K local steps from B, A fixed      server  B = sum_k p_k B_k
    even round   client  A_k <- K local steps from A, B fixed      server  A = sum_k p_k A_k

A is the factors `a:*`, B the factors `b:*`, p_k `Contribution.weight`. Exact: one factor is common to all, so s B A is
sum_k p_k s B_k A_k in every round. The kept moments of the factor that stands still neither decay nor step.

Deviations: the loss over the two factors says nothing of a classification head; here it is trained, and averaged unless
it is personal, in every round. A client that missed a round is sent both factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sfedlora.methods.base import ALL_PARTS, Contribution, HeadPlacement, Traits, mean_of_shared
from sfedlora.types import LoraSize, Part, ServerState

__all__ = ["RoLoRA"]


@dataclass(frozen=True)
class RoLoRA:
    """One factor at a time; half of FedIT's traffic."""

    head: HeadPlacement = "shared"
    name: ClassVar[str] = "rolora"
    traits: ClassVar[Traits] = Traits(exact="model")

    def trained_parts(self, round_num: int) -> frozenset[Part]:
        """B in odd rounds, A in even ones, and the head."""
        return frozenset({Part.B if round_num % 2 == 1 else Part.A, Part.HEAD})

    def shared_parts(self, round_num: int) -> frozenset[Part]:
        """What is trained, without a personal head."""
        return self.trained_parts(round_num) - self.personal_parts()

    def broadcast_parts(self, round_num: int, *, is_current: bool) -> frozenset[Part]:
        """What changed in the round before (the initial A in round 1); both factors for a client that missed it."""
        if is_current:
            return self.shared_parts(round_num - 1)
        return ALL_PARTS - self.personal_parts()

    def personal_parts(self) -> frozenset[Part]:
        """Nothing, or the head where it is personal."""
        return frozenset({Part.HEAD}) if self.head == "personal" else frozenset()

    def server_step(self, state: ServerState, contributions: Sequence[Contribution], size: LoraSize) -> ServerState:
        """The mean of the factor that was trained."""
        del size
        return mean_of_shared(state, contributions)
