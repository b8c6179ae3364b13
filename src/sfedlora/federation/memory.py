"""What torch raises where memory does not suffice."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""In lower case, of errors that have no type of their own: CPU on Linux, CPU on Windows, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer clients at a time might have done."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in message for words in _MESSAGES)
