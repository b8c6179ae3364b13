"""What every method must compute, on dense float64 matrices. NumPy only; nothing of sfedlora is imported here.

One `Module` is one adapted module in one round. Client k holds A_k (r_k, in) and B_k (out, r_k) at the end of local
training, p are the weights of the cohort and s_k is the gamma of client k. `served_*` give the dense correction of the
frozen weight, (out, in), that each client serves after the server step: base delta and adapter together. Ideal is
sum_k p_k s_k B_k A_k over the cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Dense",
    "Held",
    "Module",
    "base_after_fedex",
    "base_after_flora",
    "gamma_of",
    "ideal",
    "mean_of",
    "mean_of_rows",
    "served_fair",
    "served_fedex",
    "served_fedit",
    "served_fedsa",
    "served_ffa",
    "served_flexlora",
    "served_flora",
    "served_hetlora",
    "served_local",
    "served_rolora",
    "weights_of",
]

Dense = NDArray[np.float64]


class Held(NamedTuple):
    """A pair of factors of one module."""

    a: Dense
    b: Dense


class Module(NamedTuple):
    """One module in one round.

    Attributes:
        held: client -> its factors after local training, for everybody in the federation.
        p: client -> weight, for the cohort.
        s: client -> gamma, for everybody.
        a: the server's A before the round; it has as many rows as the largest rank.
        base: the base delta before the round.
    """

    held: Mapping[str, Held]
    p: Mapping[str, float]
    s: Mapping[str, float]
    a: Dense
    base: Dense


def gamma_of(rule: str, *, alpha: float, rank: int, num_clients: float) -> float:
    """Gamma: alpha / r, alpha / sqrt(r), alpha sqrt(N / r)."""
    if rule == "lora":
        return alpha / rank
    return float(alpha * np.sqrt(num_clients / rank if rule == "sfed" else 1.0 / rank))


def weights_of(num_examples: Mapping[str, int], weighting: str) -> dict[str, float]:
    """p_k = n_k / sum n, or 1 / m."""
    if weighting == "uniform":
        return {client: 1.0 / len(num_examples) for client in num_examples}
    total = sum(num_examples.values())
    return {client: count / total for client, count in num_examples.items()}


def mean_of(values: Mapping[str, Dense], p: Mapping[str, float]) -> Dense:
    """sum_k p_k X_k over the clients of p."""
    mean: Dense = np.sum([p[client] * values[client] for client in p], axis=0)
    return mean


def mean_of_rows(values: Mapping[str, Dense], p: Mapping[str, float], before: Dense) -> Dense:
    """Row j: the mean over the clients of p that have a row j, or the row before if none has."""
    rows = before.copy()
    for j in range(len(before)):
        senders = [client for client in p if len(values[client]) > j]
        if senders:
            rows[j] = sum(p[k] * values[k][j] for k in senders) / sum(p[k] for k in senders)
    return rows


def ideal(module: Module) -> Dense:
    """sum_k p_k s_k B_k A_k."""
    return mean_of({k: module.s[k] * module.held[k].b @ module.held[k].a for k in module.p}, module.p)


def served_fedsa(module: Module) -> dict[str, Dense]:
    """Client i serves s_i B_i times the first r_i rows of the mean A."""
    a = mean_of_rows({k: module.held[k].a for k in module.p}, module.p, module.a)
    return {i: module.s[i] * own.b @ a[: len(own.a)] for i, own in module.held.items()}


def served_fedit(module: Module) -> dict[str, Dense]:
    """Client i serves s_i (sum_k p_k B_k) (sum_k p_k A_k). One rank."""
    a, b = _means(module, module.p)
    return {i: module.s[i] * b @ a for i in module.held}


def served_ffa(module: Module) -> dict[str, Dense]:
    """Everybody serves Ideal; every client holds the same A."""
    return dict.fromkeys(module.held, ideal(module))


def served_rolora(module: Module) -> dict[str, Dense]:
    """Everybody serves Ideal; every client holds the same B in even rounds, the same A in odd ones."""
    return dict.fromkeys(module.held, ideal(module))


def base_after_flora(module: Module) -> Dense:
    """The base delta with Ideal added."""
    return module.base + ideal(module)


def served_flora(module: Module) -> dict[str, Dense]:
    """Everybody serves the new base delta alone: B is zero."""
    return dict.fromkeys(module.held, base_after_flora(module))


def base_after_fedex(module: Module) -> Dense:
    """The base delta with what the product of the mean factors lacks of Ideal added. One rank."""
    a, b = _means(module, module.p)
    return module.base + (ideal(module) - next(iter(module.s.values())) * b @ a)


def served_fedex(module: Module) -> dict[str, Dense]:
    """Everybody serves the new base delta and the product of the mean factors."""
    base, adapter = base_after_fedex(module), served_fedit(module)
    return {i: base + own for i, own in adapter.items()}


def served_flexlora(module: Module) -> dict[str, Dense]:
    """Client i serves the best approximation of Ideal at its rank: its dense SVD, cut."""
    u, singular, vt = np.linalg.svd(ideal(module))
    ranks = {i: len(own.a) for i, own in module.held.items()}
    return {i: (u[:, :rank] * singular[:rank]) @ vt[:rank] for i, rank in ranks.items()}


def served_hetlora(module: Module) -> dict[str, Dense]:
    """Client i serves s_i b[:, :r_i] a[:r_i]; a and b are means of factors padded with zeros, weighted by product."""
    norms = {k: float(np.sqrt(np.square(module.held[k].b @ module.held[k].a).sum())) for k in module.p}
    total = sum(norms.values())
    a, b = _means(module, {k: norm / total for k, norm in norms.items()} if total > 0 else module.p)
    ranks = {i: len(own.a) for i, own in module.held.items()}
    return {i: module.s[i] * b[:, :rank] @ a[:rank] for i, rank in ranks.items()}


def served_fair(module: Module, *, ridge: float = 0.01) -> dict[str, Dense]:
    """Everybody serves s (M + dB) A; dB by least squares on A^T stacked over sqrt(lambda) I, a problem per row."""
    a, m = _means(module, module.p)
    residual = mean_of({k: module.held[k].b @ module.held[k].a for k in module.p}, module.p) - m @ a
    penalty = ridge * np.mean(np.sum(a * a, axis=1))
    left = np.concatenate([a.T, np.sqrt(penalty) * np.eye(len(a))])
    right = np.concatenate([residual.T, np.zeros((len(a), len(m)))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return {i: module.s[i] * (m + solution.T) @ a for i in module.held}


def served_local(module: Module) -> dict[str, Dense]:
    """Client i serves s_i B_i A_i, whoever took part."""
    return {i: module.s[i] * own.b @ own.a for i, own in module.held.items()}


def _means(module: Module, weights: Mapping[str, float]) -> Held:
    """The weighted means of A and of B, each padded with zeros to the rank of the server's A."""
    rank = len(module.a)
    padded_a = {k: np.pad(module.held[k].a, [(0, rank - len(module.held[k].a)), (0, 0)]) for k in weights}
    padded_b = {k: np.pad(module.held[k].b, [(0, 0), (0, rank - len(module.held[k].a))]) for k in weights}
    return Held(mean_of(padded_a, weights), mean_of(padded_b, weights))
