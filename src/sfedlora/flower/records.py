"""Flower's records <-> envelopes: facts as one text, factors as one flat array of raw bytes.

One array, because Flower's cost is per array. Its bytes are read as they are: no pickle, no header to parse.
"""

from __future__ import annotations

from typing import Any, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from sfedlora.flower.envelope import ITEM_BYTES, Envelope, MessageError, WireDtype, quoted

__all__ = ["from_records", "to_records"]

_FACTS, _FACTORS, _FLAT = "sfedlora", "factors", "flat"
_RAW = "sfedlora.flat"


def to_records(envelope: Envelope) -> RecordDict:
    """An envelope as Flower's records."""
    facts = ConfigRecord({"facts": envelope.facts})
    shape = (len(envelope.data) // ITEM_BYTES[envelope.dtype],)
    flat = Array(dtype=envelope.dtype, shape=shape, stype=_RAW, data=envelope.data)
    return RecordDict({_FACTS: facts, _FACTORS: ArrayRecord({_FLAT: flat})})


def from_records(content: RecordDict) -> Envelope:
    """Flower's records as an envelope.

    Raises:
        MessageError: they hold something else.
    """
    facts, factors = content.config_records.get(_FACTS), content.array_records.get(_FACTORS)
    if facts is None or factors is None or len(content) != 2 or set(factors) != {_FLAT} or set(facts) != {"facts"}:
        raise MessageError(f"records {quoted(sorted(map(str, content)))}; expected {_FACTS!r} and {_FACTORS!r} alone")
    text: Any = facts["facts"]
    flat = factors[_FLAT]
    if not isinstance(text, str) or flat.stype != _RAW or flat.dtype not in get_args(WireDtype):
        raise MessageError("records of another kind; expected facts as text and a flat array of raw bytes")
    dtype: Any = flat.dtype
    return Envelope(text, dtype, flat.data)
