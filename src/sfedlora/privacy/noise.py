"""Gaussian noise out of a secret key.

Noise that someone else can draw again is no noise: whoever knows the seed subtracts it. Values come from SHAKE-256
(FIPS 202) over the key and the address of the draw, 53 bits a uniform, through the Box-Muller transform; without the
key they cannot be told from independent normal values. Equal keys and addresses give equal values, so a run goes on
after a stop with the bits that it would have had.

Not protected: the values are floating-point numbers, whose last bits can tell more than the real Gaussian would
(Ilya Mironov, *On Significance of the Least Significant Bits for Differential Privacy*, CCS 2012). No value is above
8.6 standard deviations.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEY_BYTES", "derive_key", "normal", "random_key"]

KEY_BYTES = 32
BLOCK_VALUES = 1 << 18
"""Values that are drawn at once."""


def random_key() -> bytes:
    """A key from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def derive_key(key: bytes, *address: str | int | bytes) -> bytes:
    """The key of one draw; without the parent key it tells nothing about other draws."""
    digest = hashlib.blake2b(key=key, digest_size=KEY_BYTES)
    for part in address:
        kind, raw = _encoded(part)
        digest.update(b"%s%d:" % (kind, len(raw)) + raw)
    return digest.digest()


def normal(key: bytes, size: int) -> NDArray[np.float64]:
    """`size` independent standard normal values; equal keys give equal values, so use a key for one draw only."""
    values = np.empty(size)
    for number, start in enumerate(range(0, size, BLOCK_VALUES)):
        stop = min(size, start + BLOCK_VALUES)
        values[start:stop] = _block(key, number, stop - start)
    return values


def _block(key: bytes, number: int, size: int) -> NDArray[np.float64]:
    num_pairs = (size + 1) // 2
    stream = hashlib.shake_256(key + number.to_bytes(8, "little")).digest(16 * num_pairs)
    uniform = (np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:num_pairs]))
    angle = 2.0 * np.pi * uniform[num_pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def _encoded(part: str | int | bytes) -> tuple[bytes, bytes]:
    if isinstance(part, bytes):
        return b"b", part
    return (b"i", str(part).encode()) if isinstance(part, int) else (b"s", part.encode())
