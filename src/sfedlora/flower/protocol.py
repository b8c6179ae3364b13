"""What server and sites say to each other: facts as JSON, factors as one flat array with a layout.

    hello    server: which federation, which configuration     site: who it is, how many examples
    round    server: shared factors, what to do with them      site: its factors that the round shares, what it measured

A message is an `Envelope` of text and bytes; nothing in it is executed. `open_*` check everything before it is used:
facts by their types, the layout against what the receiver expects, the number of bytes, and finiteness.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sfedlora.config import RunConfig
from sfedlora.flower.envelope import ITEM_BYTES, Envelope, MessageError, WireDtype, quoted
from sfedlora.types import Tensors

__all__ = [
    "LARGEST",
    "MAX_CLIENT_ID",
    "PROTOCOL",
    "Envelope",
    "Evaluated",
    "Failure",
    "FailureCode",
    "HelloReply",
    "HelloRequest",
    "Measured",
    "MessageError",
    "RoundReply",
    "RoundRequest",
    "SecureRound",
    "config_digest",
    "open_facts",
    "open_failure",
    "open_masked",
    "open_tensors",
    "seal",
    "seal_masked",
]

PROTOCOL = 1
MAX_FACTS_BYTES = 8_000_000
"""Text of one message: a layout of 10,000 factors takes about 1 MB."""
MAX_CLIENT_ID = 200
LARGEST = 1e30
"""Bound of measured numbers: sums of what a cohort reports stay finite."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Shape = Annotated[list[Annotated[int, Field(ge=1, le=1_000_000_000)]], Field(max_length=8)]
Layout = list[tuple[Name, Shape]]
"""No size is 0, so a layout that fits its bytes is no larger than they are."""
FailureCode = Literal[
    "settings", "data", "model", "state", "lost-state", "training", "diverged", "limit", "memory", "message", "internal"
]


def _printable(client_id: str) -> str:
    if not client_id.isprintable():
        raise ValueError("a client id with control characters")
    return client_id


ClientId = Annotated[str, Field(min_length=1, max_length=MAX_CLIENT_ID), AfterValidator(_printable)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class HelloRequest(_Facts):
    """The server asks a node who it is.

    Attributes:
        protocol: version of these messages.
        federation_id: which federation.
        config_sha256: digest of the configuration, which the site has too.
    """

    kind: Literal["hello"] = "hello"
    protocol: int
    federation_id: Name
    config_sha256: Name


class HelloReply(_Facts):
    """A site says who it is.

    Attributes:
        client_id: its name in the federation.
        num_examples: its training examples.
        base_sha256: digest of its base model's weight files.
        dtype: in which it loads them.
        versions: of the libraries that results depend on.
    """

    kind: Literal["hello-reply"] = "hello-reply"
    client_id: ClientId
    num_examples: Annotated[int, Field(ge=1, le=1_000_000_000)]
    base_sha256: Name
    dtype: Name
    versions: Annotated[dict[Name, Name], Field(max_length=50)]


class SecureRound(_Facts):
    """A round whose updates the server sees summed up only; all sites of the cohort are told the same.

    Attributes:
        cohort: the sites whose changes are added.
        num_examples: their training examples together, of which a site's own are its weight; None: uniform weights.
    """

    cohort: Annotated[list[ClientId], Field(max_length=10_000)]
    num_examples: Annotated[int, Field(ge=1, le=10**13)] | None = None


class RoundRequest(_Facts):
    """What a site is to do with the shared factors after round `round_num - 1`.

    Attributes:
        federation_id, client_id: to whom.
        round_num: the round that is open.
        rank, scaling: the site's own adapter.
        draw_rank: rank of random draws.
        scaling_clients: the N of the sfed rule, written to the site's adapter.
        personal_round: the round whose B and head the site is to use; 0: none yet, it starts from B = 0.
        kept_rounds: other rounds that the site must keep.
        evaluate: splits to evaluate first, with the shared factors as they come.
        train: whether to train then.
        write_adapter: whether to write the adapter that the site serves now.
        metrics: whether to send back what was measured.
        wire_dtype: number format of the reply.
        secure: the secure sum that the site's change is to enter; None: it sends its factors as they are.
        layout: names and shapes of the factors, in the order of the flat array.
    """

    kind: Literal["round"] = "round"
    federation_id: Name
    client_id: Name
    round_num: Annotated[int, Field(ge=1, le=1_000_001)]
    rank: Annotated[int, Field(ge=1, le=1_000_000)]
    scaling: Annotated[float, Field(gt=0.0)]
    draw_rank: Annotated[int, Field(ge=1, le=1_000_000)]
    scaling_clients: Annotated[float, Field(ge=1.0)]
    personal_round: Count
    kept_rounds: list[Count] = []
    evaluate: list[Literal["validation", "test"]] = []
    train: bool
    write_adapter: bool = False
    metrics: bool
    wire_dtype: WireDtype
    secure: SecureRound | None = None
    layout: Layout = []


class Measured(_Facts):
    """What local training measured; as `federation.client.TrainMetrics`, None for what is not within `LARGEST`."""

    train_loss: Number | None
    grad_norm_a: Number | None
    grad_norm_b: Number | None
    gain: Number | None
    tokens: Count
    padded_tokens: Count
    num_steps: Count


class Evaluated(_Facts):
    """Metrics over a split; as `federation.evaluate.EvalResult`."""

    num_examples: Count
    loss: Number | None
    accuracy: Number | None = None
    macro_f1: Number | None = None


class RoundReply(_Facts):
    """What a site did.

    Attributes:
        client_id, round_num: as asked for.
        num_examples: its training examples.
        trained: whether the update follows.
        personal_round: the round whose B it used, as asked for.
        measured: what training measured; None if it was not asked for.
        evaluated: split -> metrics; empty if they were not asked for.
        layout: names and shapes of the update's factors.
    """

    kind: Literal["round-reply"] = "round-reply"
    client_id: Name
    round_num: Count
    num_examples: Count
    trained: bool
    personal_round: Count
    measured: Measured | None = None
    evaluated: dict[Literal["validation", "test"], Evaluated] = {}
    layout: Layout = []


class Failure(_Facts):
    """A site could not do what it was asked for. The text of its error stays in its own log.

    Attributes:
        code: what kind of thing went wrong.
    """

    kind: Literal["failure"] = "failure"
    code: FailureCode


Facts = TypeVar("Facts", bound=_Facts)
_WITH_LAYOUT = (RoundRequest, RoundReply)


def seal(facts: _Facts, tensors: Tensors | None = None, *, dtype: WireDtype = "float32") -> Envelope:
    """Pack facts and tensors as float32, or as bfloat16, which rounds them to nearest even."""
    given = dict(tensors or {})
    if isinstance(facts, _WITH_LAYOUT):
        layout = [(name, list(tensor.shape)) for name, tensor in given.items()]
        facts = facts.model_copy(update={"layout": layout})
    blocks = (tensor.to(_DTYPES[dtype]).reshape(-1).view(torch.uint8).numpy().data for tensor in given.values())
    return Envelope(facts.model_dump_json(), dtype, b"".join(blocks))


def seal_masked(facts: RoundReply, shapes: Mapping[str, tuple[int, ...]], message: NDArray[np.uint32]) -> Envelope:
    """Pack a message of a secure sum; `shapes` are those of the factors whose changes it holds, in its order."""
    layout = [(name, list(shape)) for name, shape in shapes.items()]
    facts = facts.model_copy(update={"layout": layout})
    return Envelope(facts.model_dump_json(), "uint32", message.astype("<u4", copy=False).tobytes())


def open_facts(envelope: Envelope, kind: type[Facts]) -> Facts:
    """Read the facts of an envelope.

    Raises:
        MessageError: they are not of this kind.
    """
    if len(envelope.facts) > MAX_FACTS_BYTES:
        raise MessageError(f"{len(envelope.facts)} bytes of facts; expected at most {MAX_FACTS_BYTES}")
    try:
        return kind.model_validate_json(envelope.facts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = quoted(".".join(map(str, first["loc"]))) if first["loc"] else "the message"
        raise MessageError(f"malformed {kind.__name__}: {where}: {first['msg'][:200]}") from None


def open_failure(envelope: Envelope) -> Failure | None:
    """The failure that an envelope reports; None if it holds something else."""
    try:
        return open_facts(envelope, Failure)
    except MessageError:
        return None


def open_tensors(
    envelope: Envelope, layout: list[tuple[str, list[int]]], expected: Mapping[str, tuple[int, ...]] | None
) -> dict[str, Tensor]:
    """Read the float32 tensors of an envelope.

    Args:
        envelope: the message.
        layout: the layout that its facts state.
        expected: name -> shape of what must be there, in any order; None takes any layout that fits the bytes.

    Returns:
        Name -> tensor, to be read only: float32 is not copied out of the message.

    Raises:
        MessageError: another layout, another number of bytes, or values that are not finite.
    """
    stated = {name: tuple(shape) for name, shape in layout}
    if len(stated) < len(layout):
        raise MessageError("a tensor stands twice in the layout")
    if expected is not None and stated != dict(expected):
        raise MessageError(_difference(stated, expected))
    if envelope.dtype not in _DTYPES:
        raise MessageError(f"number format {envelope.dtype!r}; expected one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[envelope.dtype]
    num_bytes = sum(math.prod(shape) for shape in stated.values()) * ITEM_BYTES[envelope.dtype]
    if num_bytes != len(envelope.data):
        raise MessageError(f"{len(envelope.data)} bytes of factors; the layout needs {num_bytes}")
    if not num_bytes:
        return {name: torch.zeros(shape) for name, shape in stated.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(envelope.data, dtype=dtype).to(torch.float32)
    tensors, start = {}, 0
    for name, shape in stated.items():
        size = math.prod(shape)
        tensors[name] = flat[start : start + size].reshape(shape)
        start += size
        if not bool(torch.isfinite(tensors[name]).all()):
            raise MessageError(f"tensor {name!r} holds NaN or infinite values")
    return tensors


def open_masked(
    envelope: Envelope, layout: list[tuple[str, list[int]]], expected: Mapping[str, tuple[int, ...]]
) -> NDArray[np.uint32]:
    """(n,) the message of a secure sum in an envelope.

    Args:
        envelope: the message.
        layout: the layout that its facts state.
        expected: name -> shape of the factors, in order.

    Raises:
        MessageError: another number format, another layout or order, or another number of bytes.
    """
    if envelope.dtype != "uint32":
        raise MessageError(f"factors in {envelope.dtype}; asked for a message of a secure sum in uint32")
    stated = [(name, tuple(shape)) for name, shape in layout]
    if stated != list(expected.items()):
        differs = dict(stated) != dict(expected)
        raise MessageError(_difference(dict(stated), expected) if differs else "the layout has another order")
    num_bytes = sum(math.prod(shape) for shape in expected.values()) * ITEM_BYTES["uint32"]
    if num_bytes != len(envelope.data):
        raise MessageError(f"{len(envelope.data)} bytes of factors; the layout needs {num_bytes}")
    return np.frombuffer(envelope.data, "<u4").astype(np.uint32, copy=False)


def config_digest(config: RunConfig) -> str:
    """Digest of what server and sites must have in common: all but where each keeps and finds its files."""
    own: Any = {
        "output": True,
        "device": True,
        "data": {"source", "columns", "subset", "hub_split"},
        "model": {"source"},
    }
    settings = config.model_dump(mode="json", exclude=own)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _difference(stated: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    for name, shape in expected.items():
        if name not in stated:
            return f"tensor {name!r} is missing"
        if stated[name] != shape:
            return f"tensor {name!r} has shape {stated[name]}; expected {shape}"
    return f"tensor {min(stated.keys() - expected.keys())!r} was not asked for"
