"""Clipped changes with Gaussian noise: at the server on their mean, or at each client on its own.

H. Brendan McMahan, Daniel Ramage, Kunal Talwar, Li Zhang. *Learning Differentially Private Recurrent Language Models.*
ICLR 2018, arXiv:1710.06963. With x the shared factors as a client got them, x_k what it has after training, all tensors
that it sends as one vector, C the clipping norm, z the noise multiplier and m the planned size of a cohort:

    D_k = (x_k - x) min(1, C / ||x_k - x||)
    central    server   x + (sum_k D_k + N(0, (z C)^2)) / m        noise of the mean: z C / m
    local      client   sends x + D_k + N(0, (z C)^2)

m is fixed in advance. Divided by the number of replies, what one client can change would depend on how many others
replied, and a client that stays away would move all of them; so the sum is noised, and a round with fewer replies makes
a smaller step. The sum changes by at most 2 C when one client's data are replaced by other data, and by at most C when
they are left out.

Sums are in float64 and added in the order of client ids.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.errors import RunError
from sfedlora.privacy.examples import ExamplePrivacy
from sfedlora.privacy.noise import KEY_BYTES, derive_key, normal, random_key
from sfedlora.types import ServerState, Tensors

__all__ = ["NOISE_KEY", "Privacy", "Release", "change_norm", "noise_key", "noised_mean", "privatized", "with_noise_key"]

NOISE_KEY = "privacy/noise_key"
"""Where the server keeps its key in `ServerState.extra`."""


@dataclass(frozen=True)
class Privacy:
    """Client-level differential privacy of a run.

    Attributes:
        mode: who adds the noise: the server, to the mean (central), or each client, before it sends (local).
        clip_norm: C, of a client's change, over all tensors that it sends.
        noise_multiplier: z.
        delta: of the stated (epsilon, delta).
        num_clients: in the federation, among whom cohorts are drawn.
        cohort_size: planned, m.
        noise_seed: draws the noise by this number, for experiments that are to be repeated; whoever knows it can take
            the noise off. None: by a secret key.
    """

    mode: Literal["central", "local"]
    clip_norm: float
    noise_multiplier: float
    delta: float
    num_clients: int
    cohort_size: int
    noise_seed: int | None = None

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on what is released: the mean (central), or a client's change (local)."""
        return self.noise_multiplier * self.clip_norm / (self.cohort_size if self.mode == "central" else 1)

    def clip_fraction(self, norms: Sequence[float]) -> float:
        """The share of changes that are clipped, by their norms."""
        return sum(norm > self.clip_norm for norm in norms) / len(norms)


@dataclass(frozen=True)
class Release:
    """What leaves, and what was measured on the way. The norms are no part of what is protected: keep them.

    Attributes:
        tensors: the factors with noise.
        norms: of the changes before clipping, in the order of the updates.
    """

    tensors: dict[str, Tensor]
    norms: tuple[float, ...]


def change_norm(before: Tensors, after: Tensors) -> float:
    """L2 norm of the change over all tensors of `after`."""
    squares = (float(np.square(_change(before[name], tensor)).sum()) for name, tensor in after.items())
    return math.sqrt(math.fsum(squares))


def noised_mean(
    privacy: Privacy, before: Tensors, updates: Iterable[Tensors], *, round_num: int, key: bytes
) -> Release:
    """The factors after a round of central privacy.

    Args:
        privacy: its settings.
        before: the factors that were broadcast, those that are sent and no others.
        updates: what every client sent, in the order of client ids; one at a time.
        round_num: the round.
        key: the server's.

    Raises:
        RunError: more updates than a cohort was planned to have.
    """
    sums = {name: np.zeros(tuple(tensor.shape)) for name, tensor in before.items()}
    norms: list[float] = []
    for update in updates:
        norms.append(change_norm(before, update))
        factor = _clip_factor(privacy, norms[-1])
        for name, total in sums.items():
            np.add(total, factor * _change(before[name], update[name]), out=total)
    if len(norms) > privacy.cohort_size:
        raise RunError(
            f"round {round_num}: {len(norms)} updates, but the noise was planned for {privacy.cohort_size} "
            "(rounds.cohort_size)"
        )
    _add_noise(privacy, sums, derive_key(key, "mean", round_num))
    means = {name: total / privacy.cohort_size for name, total in sums.items()}
    return Release(_moved(before, means), tuple(norms))


def privatized(privacy: Privacy, before: Tensors, after: Tensors, *, round_num: int, key: bytes) -> Release:
    """What a client sends under local privacy; it calls this before anything leaves it.

    Args:
        privacy: its settings.
        before: the factors that it started from; more may be there than it sends.
        after: the factors that it would send.
        round_num: the round.
        key: the client's own.
    """
    norm = change_norm(before, after)
    factor = _clip_factor(privacy, norm)
    changes = {name: factor * _change(before[name], tensor) for name, tensor in after.items()}
    _add_noise(privacy, changes, derive_key(key, "update", round_num))
    return Release(_moved({name: before[name] for name in after}, changes), (norm,))


def with_noise_key(privacy: Privacy | ExamplePrivacy | None, state: ServerState) -> ServerState:
    """The state with a secret key, drawn once in a run, where its noise needs one."""
    if privacy is None or privacy.noise_seed is not None or NOISE_KEY in state.extra:
        return state
    key = torch.frombuffer(bytearray(random_key()), dtype=torch.uint8)
    return ServerState(state.round_num, state.shared, {**state.extra, NOISE_KEY: key})


def noise_key(privacy: Privacy | ExamplePrivacy, state: ServerState) -> bytes:
    """The key of all noise of a run: of its seed, or the one in the state.

    Raises:
        RunError: the state has none, or a damaged one.
    """
    if privacy.noise_seed is not None:
        return derive_key(privacy.noise_seed.to_bytes(8, "little"), "privacy noise")
    key = state.extra.get(NOISE_KEY)
    if key is None or key.dtype != torch.uint8 or key.numel() != KEY_BYTES:
        raise RunError(
            f"the server's state has no noise key of {KEY_BYTES} bytes in {NOISE_KEY!r}; make it with with_noise_key"
        )
    return key.cpu().numpy().tobytes()


def _add_noise(privacy: Privacy, sums: dict[str, NDArray[np.float64]], key: bytes) -> None:
    """Add N(0, (z C)^2) to every entry.

    The sums themselves enter the draw. A round that is repeated after a kill with the same replies releases the same
    values again; with other replies its noise is independent, or the difference of the two would show what changed.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(sums):
        digest.update(sums[name].tobytes())
    std = privacy.noise_multiplier * privacy.clip_norm
    for name, total in sums.items():
        noise = normal(derive_key(key, digest.digest(), name), total.size).reshape(total.shape)
        np.add(total, std * noise, out=total)


def _clip_factor(privacy: Privacy, norm: float) -> float:
    return 1.0 if norm <= privacy.clip_norm else privacy.clip_norm / norm


def _change(before: Tensor, after: Tensor) -> NDArray[np.float64]:
    change: NDArray[np.float64] = (after.detach().cpu().double() - before.detach().cpu().double()).numpy()
    return change


def _moved(before: Tensors, changes: dict[str, NDArray[np.float64]]) -> dict[str, Tensor]:
    return {
        name: (tensor.detach().cpu().double() + torch.from_numpy(changes[name])).to(tensor.dtype).to(tensor.device)
        for name, tensor in before.items()
    }
