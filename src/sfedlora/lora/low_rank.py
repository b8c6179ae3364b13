"""Products `left @ right` of thin factors, handled without the product.

With `left` (out, s) and `right` (s, in), QR of `left` and of `right^T` leaves a core of at most (s, s):

    left = Q_l R_l,  right^T = Q_r R_r,  left @ right = Q_l (R_l R_r^T) Q_r^T

The core is (min(out, s), min(in, s)), so nothing reaches (out, in) unless s does. Householder QR gives orthonormal Q
for any input, so factors that are zero or lack rank need no case of their own.

Not here: sums over clients (`algebra`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfedlora.errors import AdapterError, ConfigError

__all__ = ["ThinSVD", "product_norm", "truncated_svd"]


@dataclass(frozen=True)
class ThinSVD:
    """`u @ diag(singular) @ vt`, the best approximation of a product at its rank.

    Attributes:
        u: (out, rank), orthonormal columns.
        singular: (rank,), not negative, falling.
        vt: (rank, in), orthonormal rows; the entry of largest magnitude in each row is positive.
    """

    u: Tensor
    singular: Tensor
    vt: Tensor


def truncated_svd(left: Tensor, right: Tensor, rank: int) -> ThinSVD:
    """The singular value decomposition of `left @ right`, cut to `rank`.

    QR in the dtype of the input (at least float32), the small core and its SVD in float64; no Q is formed. The sign of
    a pair of singular vectors, which the decomposition leaves open, is fixed by `vt`. Vectors of a singular value that
    occurs twice (zero above all) are some orthonormal basis; equal input gives equal bits.

    Args:
        left: (out, s).
        right: (s, in).
        rank: number of singular values to keep, at most min(out, s, in).

    Returns:
        Tensors in float32, or float64 for float64 input.

    Raises:
        AdapterError: the shapes do not make a product.
        ConfigError: the rank is not in [1, min(out, s, in)].
    """
    _check_shapes(left, right)
    limit = min(*left.shape, right.shape[1])
    if not 1 <= rank <= limit:
        raise ConfigError(
            f"rank {rank} of a product {tuple(left.shape)} @ {tuple(right.shape)}; expected 1 to {limit}, the most "
            "singular values it has; lower lora.rank"
        )
    reflectors_left, tau_left = torch.geqrf(_wide(left))
    reflectors_right, tau_right = torch.geqrf(_wide(right).T)
    core = _triangle(reflectors_left).double() @ _triangle(reflectors_right).double().T
    u, singular, vt = torch.linalg.svd(core, full_matrices=False)
    u = _rotated(reflectors_left, tau_left, u[:, :rank])
    vt = _rotated(reflectors_right, tau_right, vt[:rank].T).T
    dtype = u.dtype
    largest = vt.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(vt.gather(1, largest) < 0, -1.0, 1.0).to(dtype)
    return ThinSVD((u * signs.T).contiguous(), singular[:rank].to(dtype), (vt * signs).contiguous())


def product_norm(left: Tensor, right: Tensor) -> float:
    """`||left @ right||_F` from two (s, s) matrices: the norm of R_l R_r^T, in float64.

    Args:
        left: (out, s).
        right: (s, in).

    Raises:
        AdapterError: the shapes do not make a product.
    """
    _check_shapes(left, right)
    r_left = torch.linalg.qr(left.double(), mode="r").R
    r_right = torch.linalg.qr(right.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(r_left @ r_right.T))


def _check_shapes(left: Tensor, right: Tensor) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise AdapterError(f"{tuple(left.shape)} @ {tuple(right.shape)} is no product; expected (out, s) @ (s, in)")


def _triangle(reflectors: Tensor) -> Tensor:
    """R (k, s) of a QR as `geqrf` packs it, k = min(rows, s)."""
    return reflectors[: min(reflectors.shape)].triu()


def _rotated(reflectors: Tensor, tau: Tensor, core: Tensor) -> Tensor:
    """Q @ core (rows, rank) for the core (k, rank): the reflectors applied to a few columns, at a tenth of Q's cost."""
    padded = reflectors.new_zeros(reflectors.shape[0], core.shape[1])
    padded[: core.shape[0]] = core
    return torch.ormqr(reflectors[:, : len(tau)], tau, padded)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
