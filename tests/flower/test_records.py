"""Flower's records and envelopes: one text, one array of raw bytes, nothing else and nothing unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.flower.envelope import Envelope, MessageError
from sfedlora.flower.records import from_records, to_records


@settings(deadline=None)
@given(st.text(), st.sampled_from(["float32", "bfloat16"]), st.binary())
def test_an_envelope_comes_out_as_it_went_in(facts: str, dtype: str, data: bytes) -> None:
    envelope = Envelope(facts, dtype, data)  # type: ignore[arg-type]
    assert from_records(to_records(envelope)) == envelope


def flat(*, dtype: str = "float32", stype: str = "sfedlora.flat", data: bytes = b"\0" * 4) -> Array:
    return Array(dtype=dtype, shape=(1,), stype=stype, data=data)


def records(array: Array | None = None, **changed: ConfigRecord | ArrayRecord | MetricRecord) -> RecordDict:
    return RecordDict(
        {
            "sfedlora": ConfigRecord({"facts": "{}"}),
            "factors": ArrayRecord({"flat": array or flat()}),
            **changed,
        }
    )


OTHERS: dict[str, Callable[[], RecordDict]] = {
    "nothing": RecordDict,
    "no facts": lambda: RecordDict({"factors": ArrayRecord({"flat": flat()})}),
    "no factors": lambda: RecordDict({"sfedlora": ConfigRecord({"facts": "{}"})}),
    "metrics besides": lambda: records(metrics=MetricRecord({"loss": 1.0})),
    "a further array": lambda: records(factors=ArrayRecord({"flat": flat(), "b": flat()})),
    "an array of another name": lambda: records(factors=ArrayRecord({"b": flat()})),
    "further facts": lambda: records(sfedlora=ConfigRecord({"facts": "{}", "b": [1.0, 2.0]})),
    "facts as bytes": lambda: records(sfedlora=ConfigRecord({"facts": b"{}"})),
    "facts as numbers": lambda: records(sfedlora=ConfigRecord({"facts": [1, 2]})),
    "facts as metrics": lambda: records(sfedlora=MetricRecord({"facts": 1})),
    "factors as facts": lambda: records(factors=ConfigRecord({"flat": "x"})),
    "another number format": lambda: records(flat(dtype="float64")),
    "another way to store": lambda: records(flat(stype="numpy.ndarray")),
    "a NumPy array": lambda: records(Array(np.ones(1, dtype=np.float32))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_records_are_refused(name: str) -> None:
    with pytest.raises(MessageError):
        from_records(OTHERS[name]())


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("stype", ["numpy.ndarray", "sfedlora.flat", "pickle"])
def test_a_pickle_is_not_executed(stype: str, tmp_path: Path) -> None:
    content = pickle.dumps(_Trap(tmp_path / "executed"))
    try:
        assert from_records(records(flat(stype=stype, data=content))).data == content
    except MessageError:
        assert stype != "sfedlora.flat"
    assert not (tmp_path / "executed").exists()
    pickle.loads(content)  # noqa: S301 - the trap works
    assert (tmp_path / "executed").exists()


def test_names_of_records_cannot_flood_or_forge_a_log() -> None:
    content = records()
    content["x\nnode 7: all is well" + "y" * 10_000] = ConfigRecord({})
    with pytest.raises(MessageError) as caught:
        from_records(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
