"""Server optimizers: momentum and adaptive steps on the change of the shared factors.

Sashank Reddi et al. *Adaptive Federated Optimization.* ICLR 2021, arXiv:2003.00295 (algorithm 2; no bias correction).
FedAvgM: Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification*, arXiv:1909.06335. With x the shared factors before the round and D what the method's server step would
change (minus the pseudo-gradient):

    fedavgm   m = beta1 m + D                     x = x + eta m
    fedadam   m = beta1 m + (1 - beta1) D         v = beta2 v + (1 - beta2) D^2
              x = x + eta m / (sqrt(v) + tau)
    fedyogi   as fedadam, with                    v = v - (1 - beta2) D^2 sign(v - D^2)

m starts at 0, v at tau^2. Only factors that were sent in the round move, and only their m and v do. What a method
states of its exactness holds for D, not for the step made of it.

m and v live in `ServerState.extra` as `momentum/<factor>` and `second_moment/<factor>`, in float32 (float64 for
float64 factors).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sfedlora.errors import RunError
from sfedlora.types import Part, ServerState, select_parts

__all__ = ["ServerOptimizer", "apply_server_optimizer"]

_MOMENTUM, _SECOND_MOMENT = "momentum/", "second_moment/"


@dataclass(frozen=True)
class ServerOptimizer:
    """One optimizer; the configuration documents each field.

    Attributes:
        name: which of the rules.
        learning_rate: eta.
        momentum: beta1.
        beta2: decay of v; not used by fedavgm.
        tau: keeps the step finite where v is small; not used by fedavgm.
    """

    name: Literal["fedavgm", "fedadam", "fedyogi"]
    learning_rate: float
    momentum: float
    beta2: float
    tau: float


def apply_server_optimizer(
    optimizer: ServerOptimizer, before: ServerState, proposed: ServerState, parts: Iterable[Part]
) -> ServerState:
    """The state after a round in which the optimizer steps along `proposed - before`.

    Args:
        optimizer: the rule.
        before: the state that the round started from; its `extra` holds m and v. Not changed.
        proposed: the state that the method's server step made. Not changed.
        parts: the parts that were sent in this round.

    Raises:
        RunError: a factor became NaN or infinite.
    """
    shared, extra = dict(proposed.shared), dict(proposed.extra)
    for name, new in select_parts(proposed.shared, parts).items():
        wide = torch.promote_types(new.dtype, torch.float32)
        old = before.shared[name].to(wide)
        change = new.to(wide) - old
        step = _step(optimizer, name, change, extra)
        shared[name] = (old + optimizer.learning_rate * step).to(new.dtype)
        if not bool(torch.isfinite(shared[name]).all()):
            raise RunError(
                f"round {proposed.round_num}: factor {name!r} became NaN or infinite in the step of {optimizer.name}; "
                "lower rounds.server_learning_rate"
            )
    return replace(proposed, shared=shared, extra=extra)


def _step(optimizer: ServerOptimizer, name: str, change: Tensor, extra: dict[str, Tensor]) -> Tensor:
    """The step of one factor before the learning rate; puts its new m and v into `extra`."""
    beta1, beta2, tau = optimizer.momentum, optimizer.beta2, optimizer.tau
    momentum = extra.get(_MOMENTUM + name, torch.zeros_like(change))
    if optimizer.name == "fedavgm":
        extra[_MOMENTUM + name] = beta1 * momentum + change
        return extra[_MOMENTUM + name]
    second, square = extra.get(_SECOND_MOMENT + name, torch.full_like(change, tau**2)), change.square()
    extra[_MOMENTUM + name] = beta1 * momentum + (1 - beta1) * change
    extra[_SECOND_MOMENT + name] = (
        beta2 * second + (1 - beta2) * square
        if optimizer.name == "fedadam"
        else second - (1 - beta2) * square * torch.sign(second - square)
    )
    return extra[_MOMENTUM + name] / (extra[_SECOND_MOMENT + name].sqrt() + tau)
