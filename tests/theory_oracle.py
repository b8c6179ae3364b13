"""Federated LoRA on a linear toy in NumPy: the independent oracle of the scaling law.

Imports neither torch nor sfedlora, so what it says cannot share a mistake with the code it judges. FedSA-LoRA with
plain SGD on full batches: every client fits `h = gamma * B_i A_i x` to its own targets, A is averaged after each round
and B_i stays on client i. Loss of a client: half the squared error, summed over outputs, mean over its examples.

References:
    Huang et al., Stabilized Fine-Tuning with LoRA in Federated Learning, arXiv:2603.08058 (gamma = alpha sqrt(N / r)).
    Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, arXiv:2410.01463 (A shared, B own).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outcome", "Toy", "draw_a", "draw_toy", "effective_count", "first_a", "gamma", "simulate", "train"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Toy:
    """The data of all clients: `inputs` (clients, examples, in), `targets` (clients, examples, out)."""

    inputs: Array
    targets: Array


@dataclass(frozen=True)
class Outcome:
    """What a simulation shows.

    Attributes:
        grad_norms_b: |dL/dB| at the first step of each round, mean over clients; index 0 is round 1.
        losses: weighted mean loss before round 1 and after each round, each client with the shared A and its own B.
        gains: gamma^2 ||A||_F^2 / in_features of the A that each round starts from.
        a: the last averaged A, (rank, in).
        b: the last B of every client, (clients, out, rank).
    """

    grad_norms_b: Array
    losses: Array
    gains: Array
    a: Array
    b: Array


def draw_toy(num_clients: int, *, size: int = 32, num_examples: int = 48, seed: int = 0) -> Toy:
    """A linear task `size -> size`, one teacher per client around a common one; client i is the same for every N."""
    common = np.random.default_rng([seed, 0]).standard_normal((size, size)) / np.sqrt(size)
    inputs, targets = [], []
    for client in range(num_clients):
        rng = np.random.default_rng([seed, 1, client])
        x = rng.standard_normal((num_examples, size))
        inputs.append(x)
        targets.append(x @ (common + 0.3 * rng.standard_normal((size, size)) / np.sqrt(size)).T)
    return Toy(np.stack(inputs), np.stack(targets))


def draw_a(num_clients: int, rank: int, in_features: int, *, seed: int = 0) -> Array:
    """One A per client, entries N(0, 1 / in_features), (clients, rank, in)."""
    draws = [
        np.random.default_rng([seed, 2, client]).standard_normal((rank, in_features)) for client in range(num_clients)
    ]
    return np.stack(draws) / math.sqrt(in_features)


def effective_count(weights: Array) -> float:
    """1 / sum w^2 for weights that sum to one."""
    return float(1.0 / np.sum(weights**2))


def gamma(rule: str, alpha: float, rank: int, count: float) -> float:
    """The factor in front of B A: alpha / r, alpha / sqrt(r), alpha sqrt(count / r)."""
    return {"lora": alpha / rank, "rslora": alpha / math.sqrt(rank), "sfed": alpha * math.sqrt(count / rank)}[rule]


def first_a(init: str, draws: Array, weights: Array) -> Array:
    """The A of every client at the start of round 1, (clients, rank, in).

    `independent`: the weighted mean of all draws; `local`: each client its own draw; `shared`: the first draw;
    `reinit`: the weighted mean times sqrt(effective count).
    """
    mean: Array = np.tensordot(weights, draws, axes=1)
    chosen = {
        "independent": mean,
        "local": draws,
        "shared": draws[0],
        "reinit": mean * np.sqrt(effective_count(weights)),
    }[init]
    return np.broadcast_to(chosen, draws.shape).copy()


def train(
    toy: Toy, start: Array, scale: float, weights: Array, *, num_rounds: int, num_steps: int, learning_rate: float
) -> Outcome:
    """Rounds of FedSA with SGD from the given A of every client (clients, rank, in) and B = 0."""
    a, b = start.copy(), np.zeros((len(start), toy.targets.shape[2], start.shape[1]))
    num_examples, in_features = toy.inputs.shape[1:]
    norms, losses, gains = [], [_loss(toy, a, b, scale, weights)], []
    for _ in range(num_rounds):
        gains.append(scale**2 * float(np.mean(np.sum(a**2, axis=(1, 2)))) / in_features)
        for step in range(num_steps):
            error = _error(toy, a, b, scale)
            outer = np.swapaxes(error, 1, 2) @ toy.inputs / num_examples  # (clients, out, in) = mean of v x^T
            grad_b, grad_a = scale * outer @ np.swapaxes(a, 1, 2), scale * np.swapaxes(b, 1, 2) @ outer
            if step == 0:
                norms.append(float(np.mean(np.linalg.norm(grad_b, axis=(1, 2)))))
            a, b = a - learning_rate * grad_a, b - learning_rate * grad_b
        a = np.broadcast_to(np.tensordot(weights, a, axes=1), a.shape).copy()
        losses.append(_loss(toy, a, b, scale, weights))
    return Outcome(np.array(norms), np.array(losses), np.array(gains), a[0], b)


def simulate(
    rule: str,
    init: str,
    num_clients: int,
    rank: int,
    weights: Sequence[float] | None = None,
    *,
    count: str = "effective",
    alpha: float = 4.0,
    num_rounds: int = 2,
    num_steps: int = 10,
    learning_rate: float = 0.0002,
    seed: int = 0,
) -> Outcome:
    """Draw the toy and train it; `sfed` takes `count` for N: `effective` (of the mean that formed A) or `total`."""
    given = np.ones(num_clients) if weights is None else np.asarray(weights, dtype=np.float64)
    normal = given / given.sum()
    toy = draw_toy(num_clients, seed=seed)
    averaged = effective_count(normal) if init in {"independent", "local"} else 1.0
    scale = gamma(rule, alpha, rank, averaged if count == "effective" else num_clients)
    start = first_a(init, draw_a(num_clients, rank, toy.inputs.shape[2], seed=seed), normal)
    return train(toy, start, scale, normal, num_rounds=num_rounds, num_steps=num_steps, learning_rate=learning_rate)


def _error(toy: Toy, a: Array, b: Array, scale: float) -> Array:
    return scale * (toy.inputs @ np.swapaxes(a, 1, 2)) @ np.swapaxes(b, 1, 2) - toy.targets


def _loss(toy: Toy, a: Array, b: Array, scale: float, weights: Array) -> float:
    per_client = 0.5 * np.mean(np.sum(_error(toy, a, b, scale) ** 2, axis=2), axis=1)
    return float(weights @ per_client)
