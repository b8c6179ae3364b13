"""Messages: they come out as they went in, and whatever else comes is refused before it is used."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfedlora.flower.envelope import Envelope, MessageError, WireDtype, failure
from sfedlora.flower.protocol import (
    Failure,
    FailureCode,
    HelloReply,
    HelloRequest,
    Measured,
    RoundReply,
    RoundRequest,
    open_facts,
    open_failure,
    open_tensors,
    seal,
)

KINDS = (HelloRequest, HelloReply, RoundRequest, RoundReply, Failure)
NAMES = st.text(min_size=1, max_size=20)
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def reply(**values: Any) -> RoundReply:
    given: dict[str, Any] = {"client_id": "a", "round_num": 1, "num_examples": 5, "trained": True, "personal_round": 0}
    return RoundReply(**given | values)


def request(**values: Any) -> RoundRequest:
    given: dict[str, Any] = {
        "federation_id": "f",
        "client_id": "a",
        "round_num": 1,
        "rank": 4,
        "scaling": 2.0,
        "draw_rank": 4,
        "scaling_clients": 3.0,
        "personal_round": 0,
        "train": True,
        "metrics": True,
        "wire_dtype": "float32",
    }
    return RoundRequest(**given | values)


def with_layout(layout: Any, data: bytes = b"", dtype: WireDtype = "float32") -> Envelope:
    return Envelope(json.dumps({**json.loads(reply().model_dump_json()), "layout": layout}), dtype, data)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, SHAPES, max_size=4), st.integers(0, 2**31 - 1))
def test_float32_tensors_come_out_bit_for_bit(shapes: dict[str, list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    envelope = seal(reply(), tensors)
    facts = open_facts(envelope, RoundReply)
    found = open_tensors(envelope, facts.layout, {name: tuple(shape) for name, shape in shapes.items()})
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor)
    numbers = [number for tensor in tensors.values() for number in tensor.reshape(-1).tolist()]
    assert envelope.data == struct.pack(f"<{len(numbers)}f", *numbers)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127),
        min_size=1,
    )
)
def test_bfloat16_rounds_to_nearest_even_and_takes_two_bytes(numbers: list[float]) -> None:
    envelope = seal(reply(), {"a": torch.tensor(numbers)}, dtype="bfloat16")
    assert len(envelope.data) == 2 * len(numbers)
    found = open_tensors(envelope, [("a", [len(numbers)])], None)["a"]
    for bits, value, number in zip(struct.unpack(f"<{len(numbers)}H", envelope.data), found, numbers, strict=True):
        whole = struct.unpack("<I", struct.pack("<f", number))[0]
        nearest = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16  # ties to the even one
        assert bits == nearest
        assert float(value) == struct.unpack("<f", struct.pack("<I", nearest << 16))[0]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(KINDS), st.text(max_size=80) | JSON.map(json.dumps))
def test_arbitrary_text_is_refused(kind: type[Failure], text: str) -> None:
    with pytest.raises(MessageError):
        open_facts(Envelope(text), kind)
    assert open_failure(Envelope(text)) is None


@settings(deadline=None, max_examples=200)
@given(st.sampled_from((reply(), request())), st.data())
def test_one_arbitrary_value_is_taken_as_itself_or_refused(
    facts: RoundReply | RoundRequest, data: st.DataObject
) -> None:
    values = json.loads(facts.model_dump_json())
    name = data.draw(st.sampled_from([*values, "more"]))
    values[name] = data.draw(JSON)
    try:
        opened = open_facts(Envelope(json.dumps(values)), type(facts))
    except MessageError:
        return
    assert json.loads(opened.model_dump_json())[name] == values[name]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(-2, 2**40), max_size=9)), max_size=3),
    st.binary(max_size=64),
    st.sampled_from(get_args(WireDtype)),
)
def test_arbitrary_layouts_and_bytes_give_tensors_of_that_layout_or_are_refused(
    layout: list[tuple[str, list[int]]], data: bytes, dtype: WireDtype
) -> None:
    envelope = with_layout(layout, data, dtype)
    try:
        facts = open_facts(envelope, RoundReply)
        tensors = open_tensors(envelope, facts.layout, None)
    except MessageError:
        return
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == dict(layout)
    assert sum(tensor.numel() for tensor in tensors.values()) * (4 if dtype == "float32" else 2) == len(data)


@pytest.mark.parametrize("shape", [[10**9] * 8, [10**9, 10**9, 10**9, 0], [0], [10**30], [-1], [1.0], [True], [1] * 9])
def test_shapes_that_no_bytes_fit_are_refused_before_memory_is_taken(shape: list[Any]) -> None:
    tracemalloc.start()
    try:
        envelope = with_layout([["a", shape]], b"\0" * 4)
        with pytest.raises(MessageError):
            open_tensors(envelope, open_facts(envelope, RoundReply).layout, None)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


EXPECTED = {"a": (2, 3), "b": (3,)}
GOOD = {"a": torch.ones(2, 3), "b": torch.ones(3)}
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": ({"a": torch.ones(2, 3)}, "tensor 'b' is missing"),
    "another": ({**GOOD, "c": torch.ones(1)}, "tensor 'c' was not asked for"),
    "turned": ({**GOOD, "a": torch.ones(3, 2)}, r"tensor 'a' has shape \(3, 2\); expected \(2, 3\)"),
    "nan": ({**GOOD, "b": torch.tensor([1.0, math.nan, 1.0])}, "tensor 'b' holds NaN or infinite values"),
    "infinite": ({**GOOD, "b": torch.tensor([1.0, -math.inf, 1.0])}, "tensor 'b' holds NaN or infinite values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_tensors_than_expected_are_refused_by_name(name: str) -> None:
    tensors, message = WRONG[name]
    envelope = seal(reply(), tensors)
    with pytest.raises(MessageError, match=message):
        open_tensors(envelope, open_facts(envelope, RoundReply).layout, EXPECTED)


def test_a_tensor_that_stands_twice_is_refused() -> None:
    with pytest.raises(MessageError, match="twice"):
        open_tensors(Envelope("", "float32", b"\0" * 8), [("a", [1]), ("a", [1])], {"a": (1,)})


@pytest.mark.parametrize("num_bytes", [0, 1, 35, 37, 72])
def test_too_few_or_too_many_bytes_are_refused(num_bytes: int) -> None:
    envelope = seal(reply(), GOOD)
    layout = open_facts(envelope, RoundReply).layout
    with pytest.raises(MessageError, match=f"{num_bytes} bytes of factors; the layout needs 36"):
        open_tensors(Envelope(envelope.facts, "float32", b"\0" * num_bytes), layout, EXPECTED)


def test_bytes_of_another_number_format_are_refused() -> None:
    with pytest.raises(MessageError, match="number format 'float64'"):
        open_tensors(Envelope("", "float64", b"\0" * 8), [("a", [1])], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"kind":' * 3000, "\x00", '{"kind":"\ud800"}', "null", ""]
)
@pytest.mark.parametrize("kind", KINDS)
def test_deep_long_and_broken_json_is_refused(kind: type[Failure], text: str) -> None:
    with pytest.raises(MessageError):
        open_facts(Envelope(text), kind)


def test_more_text_than_a_message_may_have_is_not_parsed() -> None:
    with pytest.raises(MessageError, match="bytes of facts"):
        open_facts(Envelope(" " * 9_000_000), RoundReply)


def test_what_the_other_side_wrote_cannot_flood_or_forge_a_log() -> None:
    values = {**json.loads(reply().model_dump_json()), "x\n12:00:00 sfedlora: all is well " + "y" * 100_000: 1}
    with pytest.raises(MessageError) as caught:
        open_facts(Envelope(json.dumps(values)), RoundReply)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("client_id", ["", "a\nb", "\x1b[2J", "x" * 201])
def test_a_client_id_is_one_short_line(client_id: str) -> None:
    facts = {"kind": "hello-reply", "client_id": client_id, "num_examples": 1, "base_sha256": "0", "dtype": "float32"}
    with pytest.raises(MessageError, match="client_id"):
        open_facts(Envelope(json.dumps({**facts, "versions": {}})), HelloReply)


@pytest.mark.parametrize("value", [1e308, -1e308])
def test_measurements_that_would_overflow_a_mean_are_refused(value: float) -> None:
    measured = {"train_loss": 1.0, "grad_norm_a": value, "grad_norm_b": 1.0, "gain": 1.0}
    counts = {"tokens": 1, "padded_tokens": 1, "num_steps": 1}
    Measured.model_validate({**measured, **counts, "grad_norm_a": 1e29})
    text = json.dumps({**json.loads(reply().model_dump_json()), "measured": {**measured, **counts}})
    with pytest.raises(MessageError, match="grad_norm_a"):
        open_facts(Envelope(text), RoundReply)


@pytest.mark.parametrize("code", get_args(FailureCode))
def test_a_failure_is_a_code_and_nothing_more(code: FailureCode) -> None:
    assert open_failure(failure(code)) == Failure(code=code)
    assert open_failure(Envelope(json.dumps({"kind": "failure", "code": code, "text": "secret"}))) is None


def test_a_failure_of_another_code_is_none() -> None:
    assert open_failure(failure("because /home/ann/patients.csv is empty")) is None
