"""What torch raises where memory does not suffice."""

from __future__ import annotations

import warnings

import torch

__all__ = ["is_out_of_memory", "warn_of_halving"]

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""In lower case, of errors that have no type of their own: CPU on Linux, CPU on Windows, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer clients at a time might have done."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in message for words in _MESSAGES)


def warn_of_halving(num_clients: int, half: int, reason: str) -> None:
    """Say that so many clients were too many for one batch, and how many there are from now on."""
    warnings.warn(
        f"{num_clients} clients in one batch do not fit into memory ({reason}); going on with {half}", stacklevel=3
    )
