"""Tensors as one block of bytes and a list of what lies where: how they travel between processes.

Every data type arrives with the bits it had. Not here: any format that is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.types import Tensors

__all__ = ["Packed", "pack", "unpack"]

ALIGNMENT = 16
"""Bytes; a tensor begins at a multiple, which is enough for every element size."""


@dataclass(frozen=True)
class Packed:
    """Named tensors as bytes.

    Attributes:
        block: all of them, one after the other.
        layout: name, data type, shape and first byte of each.
    """

    block: NDArray[np.uint8]
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]


def pack(tensors: Tensors) -> Packed:
    """One copy of the tensors, from whatever device."""
    layout, size = [], 0
    for name, tensor in tensors.items():
        layout.append((name, tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    block = np.zeros(size, dtype=np.uint8)
    for (_, _, _, start), tensor in zip(layout, tensors.values(), strict=True):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        block[start : start + len(data)] = data
    return Packed(block, tuple(layout))


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The tensors on the CPU, views of one copy; the block itself may belong to somebody else."""
    block = torch.from_numpy(packed.block.copy())
    return {
        name: block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for name, dtype, shape, start in packed.layout
    }
