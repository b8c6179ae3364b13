"""Every random draw takes a seed derived from its address.

`derive_seed(root, "client", client_id, round_num)` gives the same number in the simulator, over the
network and after a resume, because nothing but the address enters it. No generator state is ever stored.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["derive_seed", "numpy_generator", "torch_generator"]


def derive_seed(root: int, *address: str | int) -> int:
    """Derive a 63-bit seed from a root seed and an address.

    Args:
        root: the run's seed.
        *address: what the draw is for, from the general to the particular, for example
            `("init_a", client_id, module)`. Strings and integers are told apart (`"1"` is not `1`).

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (root, *address):
        kind, text = ("i", str(part)) if isinstance(part, int) else ("s", part)
        raw = text.encode()
        digest.update(f"{kind}{len(raw)}:".encode() + raw)
    return int.from_bytes(digest.digest(), "big") >> 1


def numpy_generator(root: int, *address: str | int) -> np.random.Generator:
    """A NumPy generator for one address."""
    return np.random.default_rng(derive_seed(root, *address))


def torch_generator(root: int, *address: str | int) -> torch.Generator:
    """A CPU torch generator for one address (draws are made on the CPU, then moved: same bits everywhere)."""
    return torch.Generator().manual_seed(derive_seed(root, *address))
