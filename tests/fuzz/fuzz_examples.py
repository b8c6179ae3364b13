"""A file of examples. The first byte says which kind: l(ines), j(son), c(sv), t(sv), y(aml)."""

from __future__ import annotations

from fuzz.scratch import write_scratch
from sfedlora.data.examples import load_examples
from sfedlora.errors import SfedLoraError

SUFFIXES = {"l": ".jsonl", "j": ".json", "c": ".csv", "t": ".tsv", "y": ".yml"}


def fuzz_one(data: bytes) -> None:
    """Only typed errors come out; columns of what is accepted have one length."""
    suffix = SUFFIXES.get(chr(data[0])) if data else None
    if suffix is None:
        return
    path = write_scratch(f"rows{suffix}", data[1:])
    try:
        examples = load_examples(str(path))
    except SfedLoraError:
        return
    lengths = {len(examples.column(name)) for name in examples.columns}
    if lengths != {len(examples)}:
        raise AssertionError(f"columns of lengths {lengths}, {len(examples)} examples")
