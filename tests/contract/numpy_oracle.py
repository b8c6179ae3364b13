"""What every method must compute, on dense float64 matrices. NumPy only; nothing of sfedlora is imported here.

A client holds A (rank, in) and B (out, rank) at the end of a round; p are the weights of the cohort, s the scaling.
`served_*` give the dense delta weight s B A, (out, in), that each client serves after the server step. Ideal is
sum_k p_k s B_k A_k over the cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Dense",
    "Held",
    "ideal",
    "mean_of",
    "served_fair",
    "served_fedit",
    "served_fedsa",
    "served_ffa",
    "served_flexlora",
    "served_hetlora",
    "served_local",
    "served_rolora",
    "weights_of",
]

Dense = NDArray[np.float64]


class Held(NamedTuple):
    """One client's factors of one module."""

    a: Dense
    b: Dense


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


def ideal(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> Dense:
    """sum_k p_k s B_k A_k, dense."""
    return mean_of({client: s * held[client].b @ held[client].a for client in p}, p)


def served_fedsa(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """Client i serves s B_i (sum_k p_k A_k)."""
    a = mean_of({client: held[client].a for client in p}, p)
    return {client: s * own.b @ a for client, own in held.items()}


def served_fedit(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """Everybody serves s (sum_k p_k B_k) (sum_k p_k A_k)."""
    a = mean_of({client: held[client].a for client in p}, p)
    b = mean_of({client: held[client].b for client in p}, p)
    return dict.fromkeys(held, s * b @ a)


def served_ffa(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """Everybody serves Ideal; every client holds the same A."""
    return dict.fromkeys(held, ideal(held, p, s))


def served_rolora(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """Everybody serves Ideal; every client holds the same B in even rounds, the same A in odd ones."""
    return dict.fromkeys(held, ideal(held, p, s))


def served_flexlora(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """Everybody serves the best approximation of Ideal at the rank: its dense SVD, cut."""
    rank = next(iter(held.values())).a.shape[0]
    u, singular, vt = np.linalg.svd(ideal(held, p, s))
    return dict.fromkeys(held, (u[:, :rank] * singular[:rank]) @ vt[:rank])


def served_hetlora(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """FedIT with weights ||B_k A_k||_F / sum_j ||B_j A_j||_F in place of p_k."""
    norms = {client: np.sqrt(np.square(held[client].b @ held[client].a).sum()) for client in p}
    total = sum(norms.values())
    return served_fedit(held, {client: float(norm / total) for client, norm in norms.items()}, s)


def served_fair(held: Mapping[str, Held], p: Mapping[str, float], s: float, *, ridge: float = 0.01) -> dict[str, Dense]:
    """Everybody serves s (M + dB) A; dB by least squares on A^T stacked over sqrt(lambda) I, a problem per row."""
    a = mean_of({client: held[client].a for client in p}, p)
    m = mean_of({client: held[client].b for client in p}, p)
    residual = ideal(held, p, 1.0) - m @ a
    penalty = ridge * np.mean(np.sum(a * a, axis=1))
    left = np.concatenate([a.T, np.sqrt(penalty) * np.eye(len(a))])
    right = np.concatenate([residual.T, np.zeros((len(a), len(m)))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return dict.fromkeys(held, s * (m + solution.T) @ a)


def served_local(held: Mapping[str, Held], p: Mapping[str, float], s: float) -> dict[str, Dense]:
    """Client i serves s B_i A_i, whoever took part."""
    del p
    return {client: s * own.b @ own.a for client, own in held.items()}
