"""Differential privacy of single examples at a site: clipped gradients of examples, and noise on their sum.

Martin Abadi et al. *Deep Learning with Differential Privacy.* CCS 2016, arXiv:1607.00133 (DP-SGD). At every optimizer
step, with g_i the gradient of the mean loss of example i for all factors that the client trains:

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, (z C)^2)) / batch size

Everything that the client makes of it has the same guarantee: what it sends, its own B, its head.

No amplification by sampling is claimed. Batches are no Poisson samples; which examples are in one depends on the seed
and on how many there are, and not on their lengths (unlike batches without privacy). So an example that is replaced by
another moves the sum of every step that it is in by at most 2 C, and no other: its epsilon is that of as many Gaussians
of multiplier z / 2 as there are such steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sfedlora.privacy.noise import KEY_BYTES, derive_key, normal

__all__ = ["ExamplePrivacy", "add_clipped", "most_uses", "noised_gradients"]


@dataclass(frozen=True)
class ExamplePrivacy:
    """Example-level differential privacy of local training.

    Attributes:
        clip_norm: C, of the gradient of one example, over all factors that are trained.
        noise_multiplier: z.
        delta: of the stated (epsilon, delta).
        noise_seed: as `Privacy.noise_seed`.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    noise_seed: int | None = None


def most_uses(num_examples: int, *, batch_size: int, local_steps: int | None, local_epochs: int | None) -> int:
    """In how many optimizer steps of a round one example is at most; one micro-batch a step."""
    if local_steps is None:
        return local_epochs or 0
    return max(1, math.ceil(local_steps * min(batch_size, num_examples) / num_examples))


def add_clipped(privacy: ExamplePrivacy, sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Add one example's gradient, scaled to C where it is longer."""
    norm = math.sqrt(math.fsum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    factor = 1.0 if norm <= privacy.clip_norm else privacy.clip_norm / norm
    for name, gradient in gradients.items():
        sums[name].add_(gradient, alpha=factor)


def noised_gradients(
    privacy: ExamplePrivacy, sums: Mapping[str, Tensor], *, batch_size: int, key: bytes
) -> dict[str, Tensor]:
    """The gradient of a step. The sums enter the draw: a step that is repeated on another model has other noise.

    Args:
        privacy: its settings.
        sums: of the clipped gradients.
        batch_size: examples of a full batch.
        key: of this client, round and step.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(sums):
        digest.update(sums[name].detach().cpu().numpy().tobytes())
    std = privacy.noise_multiplier * privacy.clip_norm
    result = {}
    for name, total in sums.items():
        noise = torch.from_numpy(normal(derive_key(key, digest.digest(), name), total.numel())).view(total.shape)
        result[name] = (total + (std * noise).to(total.dtype).to(total.device)) / batch_size
    return result
