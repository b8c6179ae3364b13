"""Records of Flower, as either side takes them. The first byte says how they are given.

`w`: Flower's own bytes of a RecordDict, as they come over the wire.
`r`: text NUL number format NUL way to store NUL name of the array NUL bytes of the array.
"""

from __future__ import annotations

import json
import math
from typing import get_args

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from sfedlora.flower.envelope import ITEM_BYTES, Envelope, MessageError
from sfedlora.flower.protocol import (
    MAX_FACTS_BYTES,
    Failure,
    FailureCode,
    HelloReply,
    HelloRequest,
    RoundReply,
    RoundRequest,
    open_facts,
    open_failure,
    open_masked,
    open_tensors,
)
from sfedlora.flower.records import from_records, to_records

EXPECTED = {"a:x": (2, 3), "b:x": (4,)}
"""What the server asked a site for."""
WITH_LAYOUT = (RoundRequest, RoundReply)


def fuzz_one(data: bytes) -> None:
    """Only MessageError comes out; what is accepted is what was stated and takes no more than its bytes."""
    records = _records(data)
    if records is None:
        return
    try:
        envelope = from_records(records)
    except MessageError:
        return
    if from_records(to_records(envelope)) != envelope:
        raise AssertionError("an envelope does not come back from its own records")
    failed = open_failure(envelope)
    if failed is not None and failed.code not in get_args(FailureCode):
        raise AssertionError(f"a failure of code {failed.code!r} was accepted")
    for kind in (HelloRequest, HelloReply, RoundRequest, RoundReply, Failure):
        try:
            facts = open_facts(envelope, kind)
        except MessageError:
            continue
        if len(envelope.facts) > MAX_FACTS_BYTES or open_facts(Envelope(facts.model_dump_json()), kind) != facts:
            raise AssertionError(f"{kind.__name__} does not come back from its own text")
        json.loads(envelope.facts)
        if isinstance(facts, WITH_LAYOUT):
            _open_factors(envelope, facts.layout)


def _records(data: bytes) -> RecordDict | None:
    """The records of an input; None for what Flower itself takes for none."""
    how, content = data[:1], data[1:]
    if how == b"w":
        try:
            return recorddict_from_proto(Proto.FromString(content))
        except Exception:  # Flower's own checks, before anything of ours sees it
            return None
    if how == b"r" and content.count(b"\0") >= 4:
        facts, dtype, stype, name, flat = content.split(b"\0", 4)
        text, *names = (part.decode("utf-8", "surrogateescape") for part in (facts, dtype, stype, name))
        array = Array(dtype=names[0], shape=(len(flat),), stype=names[1], data=flat)
        return RecordDict({"sfedlora": ConfigRecord({"facts": text}), "factors": ArrayRecord({names[2]: array})})
    return None


def _open_factors(envelope: Envelope, layout: list[tuple[str, list[int]]]) -> None:
    """As a site does, which takes any layout that fits the bytes, and as the server, which knows what it asked for."""
    for expected in (None, EXPECTED):
        try:
            tensors = open_tensors(envelope, layout, expected)
        except MessageError:
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        num_bytes = sum(math.prod(shape) for shape in shapes.values()) * ITEM_BYTES[envelope.dtype]
        if shapes != {name: tuple(shape) for name, shape in layout} or num_bytes != len(envelope.data):
            raise AssertionError("factors of another layout were accepted")
        if not all(one.dtype == torch.float32 and bool(torch.isfinite(one).all()) for one in tensors.values()):
            raise AssertionError("factors that are no finite float32 were accepted")
    try:
        message = open_masked(envelope, layout, EXPECTED)
    except MessageError:
        return
    if message.size != sum(math.prod(shape) for shape in EXPECTED.values()):
        raise AssertionError("a message of a secure sum of another length was accepted")
