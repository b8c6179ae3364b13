"""A configuration file and overrides: `file NUL override NUL override ...`."""

from __future__ import annotations

from fuzz.scratch import write_scratch
from sfedlora.config import RunConfig
from sfedlora.errors import SfedLoraError


def fuzz_one(data: bytes) -> None:
    """Only typed errors come out; what is accepted comes back from its own dump."""
    content, *overrides = data.split(b"\0")
    path = write_scratch("run.yaml", content)
    try:
        config = RunConfig.load(path, [item.decode("utf-8", "surrogateescape") for item in overrides])
    except SfedLoraError:
        return
    written = write_scratch("written.yaml", config.dump().encode())
    if RunConfig.load(written) != config:
        raise AssertionError(f"{config.dump()!r} does not come back")
