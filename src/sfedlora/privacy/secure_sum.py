"""A sum of which the server learns nothing but the sum: every site adds masks that cancel.

Keith Bonawitz et al. *Practical Secure Aggregation for Privacy-Preserving Machine Learning.* CCS 2017, without its
recovery of dropouts. Site i of a cohort sends, entry by entry modulo 2^32,

    y_i = q(x_i) + sum_{j > i} mask_ij - sum_{j < i} mask_ij          q(x) = round(x s),  s = (2^31 - 1 - m) / (m limit)

and sum_i y_i = sum_i q(x_i). mask_ij is a ChaCha20 stream whose key comes by X25519 and HKDF-SHA256 from the keys of i
and j, the federation, the round, the cohort and the terms. Sites exchange public keys beforehand, apart from the
server: one that hands out the keys could put its own in their place.

The server, and sites that tell it all they know, learn the sum over the other sites, which is why a cohort has three at
least. Nobody can check a single update: for outliers, for its norm, or for values that are not finite; one site can
spoil the sum. If one message is missing, the sum cannot be opened and the round is void.

A site sends one message for a round and keeps to it (`masked` with equal arguments gives equal bits). Two that differ
would show their difference; and the sums over two cohorts of one round would show who was in one of them only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from sfedlora.errors import ConfigError, RunError

__all__ = [
    "FEWEST_SITES",
    "LimitError",
    "SecureSum",
    "masked",
    "new_private_key",
    "opened",
    "public_key_of",
    "with_message",
]

FEWEST_SITES = 3
BLOCK_VALUES = 1 << 20
"""Entries of a mask that are made at once."""


class LimitError(RunError):
    """A site's value is beyond the limit, or is not finite."""


@dataclass(frozen=True)
class SecureSum:
    """The sum of one round.

    Attributes:
        federation_id: of the federation.
        round_num: the round.
        cohort: the sites whose updates are added, all of them.
        limit: largest absolute value of an entry; the sum is exact to about m^2 limit / 2^32.
        terms: digest of whatever else all sites must have been told alike; masks of sites with other terms do not
            cancel.
    """

    federation_id: str
    round_num: int
    cohort: tuple[str, ...]
    limit: float
    terms: str = ""

    @property
    def scale(self) -> float:
        """s, whole numbers per unit."""
        return (2**31 - 1 - len(self.cohort)) / (len(self.cohort) * self.limit)


def new_private_key() -> bytes:
    """A site's private key (32 bytes); it stays at the site, in a file that its owner alone can read."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key_of(private_key: bytes) -> bytes:
    """What the other sites are given."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def masked(
    total: SecureSum, site: str, values: NDArray[np.float32], *, private_key: bytes, public_keys: Mapping[str, bytes]
) -> NDArray[np.uint32]:
    """What a site sends: its values in whole numbers under its masks, 4 bytes each.

    Args:
        total: the sum.
        site: its id.
        values: (n,) the packed change of its factors.
        private_key: its own.
        public_keys: those of the cohort, as the site was given them by the others.

    Raises:
        ConfigError: fewer than three sites, or a key is missing.
        LimitError: a value beyond the limit or not finite, which nobody else could find.
    """
    _require_cohort(total, site, public_keys)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= total.limit:
        raise LimitError(f"secure sum: a value of {largest:g} is beyond the limit of {total.limit:g}; raise the limit")
    message = np.rint(values.astype(np.float64) * total.scale).astype(np.int64).astype(np.uint32)
    own = X25519PrivateKey.from_private_bytes(private_key)
    for other in sorted(total.cohort):
        if other != site:
            shared = own.exchange(X25519PublicKey.from_public_bytes(public_keys[other]))
            _add_mask(message, _mask_key(total, shared, site, other), subtract=other < site)
    return message


def with_message(so_far: NDArray[np.uint32] | None, message: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The sum with one more message; `so_far` is changed in place, None begins."""
    if so_far is None:
        return message.copy()
    if so_far.shape != message.shape or message.dtype != np.uint32:
        raise RunError(f"secure sum: a message of {message.shape} {message.dtype}; expected {so_far.shape} uint32")
    return np.add(so_far, message, out=so_far)


def opened(total: SecureSum, messages: NDArray[np.uint32], senders: Collection[str]) -> NDArray[np.float64]:
    """(n,) the sum of the values of all sites.

    Args:
        total: the sum.
        messages: their sum by `with_message`.
        senders: whose messages are in it, each once.

    Raises:
        RunError: a message is missing or there are too many; the round is void.
    """
    if sorted(senders) != sorted(total.cohort):
        missing = sorted({*total.cohort} - {*senders})
        raise RunError(
            f"secure sum of round {total.round_num}: messages of {', '.join(missing) or 'nobody'} are missing, "
            f"{len(senders)} of {len(total.cohort)} came; masks cancel only if each is there once, so the round is void"
        )
    return messages.view(np.int32).astype(np.float64) / total.scale


def _require_cohort(total: SecureSum, site: str, public_keys: Mapping[str, bytes]) -> None:
    if len({*total.cohort}) < max(FEWEST_SITES, len(total.cohort)):
        raise ConfigError(
            f"secure sum: a cohort of {len({*total.cohort})} sites; expected at least {FEWEST_SITES}, each once, "
            "or the sum tells one site's update to another"
        )
    unknown = sorted({site, *total.cohort} - ({*total.cohort} & public_keys.keys()))
    if unknown:
        raise ConfigError(f"secure sum: no public key of {', '.join(unknown)}; exchange keys among the sites first")


def _mask_key(total: SecureSum, shared: bytes, site: str, other: str) -> bytes:
    """The key of a pair's mask in this sum; both sides compute the same."""
    words = [total.federation_id, str(total.round_num), *sorted((site, other)), *sorted(total.cohort), total.terms]
    info = b"sfedlora secure sum" + b"".join(b"%d:%s" % (len(raw), raw) for raw in (word.encode() for word in words))
    return HKDF(SHA256(), 32, salt=None, info=info).derive(shared)


def _add_mask(message: NDArray[np.uint32], key: bytes, *, subtract: bool) -> None:
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, len(message), BLOCK_VALUES):
        block = message[start : start + BLOCK_VALUES]
        mask = np.frombuffer(stream.update(bytes(4 * len(block))), "<u4")
        (np.subtract if subtract else np.add)(block, mask, out=block)
