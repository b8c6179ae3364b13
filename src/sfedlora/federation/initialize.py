"""The initial A: who draws it, how it is averaged, and how many clients that average stands for.

Draws need no data: each comes from a seed and an owner's name, so any party can repeat them. They are
N(0, sigma^2) with sigma^2 = 1 / (3 in_features), the variance of PEFT's default (Kaiming-uniform) initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfedlora.lora.algebra import weighted_mean
from sfedlora.lora.scaling import effective_clients
from sfedlora.seeds import torch_generator
from sfedlora.types import AdapterLayout, Part, Tensors, factor_name

__all__ = ["MAX_DRAWN_CLIENTS", "SHARED_OWNER", "InitialA", "Initialization", "draw_a", "form_initial_a"]

Initialization = Literal["independent", "local", "shared", "reinit"]
MAX_DRAWN_CLIENTS = 1000
"""Above so many clients the mean's own law N(0, sigma^2 sum w^2) is drawn once instead of N draws."""
SHARED_OWNER, MEAN_OWNER = 0, 1
"""Owners of the one draw of `shared` and of the mean's law: numbers, so that no client id can be one of them."""


@dataclass(frozen=True)
class InitialA:
    """The A that the server starts from.

    Attributes:
        tensors: factor name -> (rank, in_features), float32.
        effective_clients: the N that sfed may count on: `averaged_clients`, but 1 for `reinit`, which rescales A.
        averaged_clients: 1 / sum w^2 of the average that formed A; 1 for `shared`.
        measured_clients: sum_i w_i ||A_i||^2 / ||sum_i w_i A_i||^2 over the draws made; None where the mean's law was
            drawn directly or nothing was averaged.
    """

    tensors: Tensors
    effective_clients: float
    averaged_clients: float
    measured_clients: float | None


def draw_a(
    layout: AdapterLayout,
    rank: int,
    *,
    seed: int,
    owner: str | int,
    round_num: int = 1,
    variance_factor: float = 1.0,
) -> dict[str, Tensor]:
    """One owner's draw of every A, (rank, in_features) each, float32.

    Args:
        layout: the adapted modules.
        rank: the rank.
        seed: the run's seed.
        owner: client id, or SHARED_OWNER or MEAN_OWNER for a draw that belongs to no client.
        round_num: the round that begins with this draw.
        variance_factor: multiplies sigma^2.
    """
    address: tuple[str | int, ...] = ("init_a", owner) if round_num == 1 else ("init_a", owner, round_num)
    draws: dict[str, Tensor] = {}
    for target in layout.targets:
        generator = torch_generator(seed, *address, target.path)
        std = math.sqrt(variance_factor / (3.0 * target.in_features))
        draws[factor_name(Part.A, target.path)] = torch.randn(rank, target.in_features, generator=generator) * std
    return draws


def form_initial_a(
    layout: AdapterLayout, rank: int, *, weights: Mapping[str, float], init: Initialization, seed: int
) -> InitialA:
    """Form the server's A before round 1.

        independent, local   A = sum_i w_i A_i
        reinit               A = sqrt(N_eff) sum_i w_i A_i
        shared               A = one draw

    Args:
        layout: the adapted modules.
        rank: the rank.
        weights: client id -> w_i, adding up to 1.
        init: which of the rules. `local` clients still start round 1 from their own A_i.
        seed: the run's seed.
    """
    if init == "shared":
        return InitialA(draw_a(layout, rank, seed=seed, owner=SHARED_OWNER), 1.0, 1.0, None)
    count = effective_clients(list(weights.values()))
    if len(weights) > MAX_DRAWN_CLIENTS:
        law = draw_a(layout, rank, seed=seed, owner=MEAN_OWNER, variance_factor=1.0 / count)
        tensors, measured = law, None
    else:
        tensors, measured = _average_draws(layout, rank, weights, seed)
    if init == "reinit":
        return InitialA({name: tensor * math.sqrt(count) for name, tensor in tensors.items()}, 1.0, count, measured)
    return InitialA(tensors, count, count, measured)


def _average_draws(
    layout: AdapterLayout, rank: int, weights: Mapping[str, float], seed: int
) -> tuple[dict[str, Tensor], float]:
    single = 0.0

    def draws() -> Iterator[tuple[float, Tensors]]:
        nonlocal single
        for client_id in sorted(weights):
            own = draw_a(layout, rank, seed=seed, owner=client_id)
            single += weights[client_id] * _squared_norm(own)
            yield weights[client_id], own

    mean = weighted_mean(draws())
    return mean, single / _squared_norm(mean)


def _squared_norm(tensors: Tensors) -> float:
    return sum(float(torch.linalg.vector_norm(tensor)) ** 2 for tensor in tensors.values())
