"""One message as text and bytes. Nothing here imports torch: a site's client process only hands messages on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfedlora.errors import SfedLoraError

__all__ = ["ITEM_BYTES", "Envelope", "MessageError", "WireDtype", "failure", "quoted"]

WireDtype = Literal["float32", "bfloat16", "uint32"]
"""uint32: whole numbers under masks, where a secure sum was asked for."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "uint32": 4}
QUOTED_LENGTH = 100


class MessageError(SfedLoraError):
    """A message that the receiver refuses."""


@dataclass(frozen=True)
class Envelope:
    """One message.

    Attributes:
        facts: a JSON object.
        dtype: of the flat array.
        data: the flat array, little-endian.
    """

    facts: str
    dtype: WireDtype = "float32"
    data: bytes = b""


def failure(code: str) -> Envelope:
    """A `protocol.Failure` on its way."""
    return Envelope(f'{{"kind":"failure","code":"{code}"}}')


def quoted(text: object) -> str:
    """Text that the other side chose, as a log can take it: on one line, without control characters, short."""
    shown = str(text)
    return repr(shown if len(shown) <= QUOTED_LENGTH else f"{shown[:QUOTED_LENGTH]}...")
