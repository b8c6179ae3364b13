"""A Parquet file of examples."""

from __future__ import annotations

from fuzz.scratch import write_scratch
from sfedlora.data.examples import load_examples
from sfedlora.errors import SfedLoraError


def fuzz_one(data: bytes) -> None:
    """Only typed errors come out; columns of what is accepted have one length."""
    path = write_scratch("rows.parquet", data)
    try:
        examples = load_examples(str(path))
    except SfedLoraError:
        return
    lengths = {len(examples.column(name)) for name in examples.columns}
    if lengths != {len(examples)}:
        raise AssertionError(f"columns of lengths {lengths}, {len(examples)} examples")
