"""Tensors as bytes: every data type and shape arrives with its bits."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from sfedlora.federation.runners.packing import pack, unpack

GENERATOR = torch.Generator().manual_seed(0)
MIXED = {
    "float32": torch.randn(3, 5, generator=GENERATOR),
    "not contiguous": torch.randn(4, 6, generator=GENERATOR).T[::2],
    "bfloat16": torch.randn(7, generator=GENERATOR).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.tensor([[2**40, -1]]),
    "odd bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "float64": torch.randn(2, generator=GENERATOR, dtype=torch.float64),
    "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    "gradient": torch.ones(2, requires_grad=True),
}


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def test_names_order_types_shapes_and_bits_survive_a_pickle() -> None:
    back = unpack(pickle.loads(pickle.dumps(pack(MIXED))))  # noqa: S301 - made here
    assert list(back) == list(MIXED)
    for name, tensor in MIXED.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name


def test_nothing_is_nothing() -> None:
    assert unpack(pack({})) == {}


@pytest.mark.filterwarnings("error")
def test_tensors_of_a_block_that_must_not_be_written_can_be_written() -> None:
    packed = pack({"one": torch.ones(3)})
    packed.block.setflags(write=False)  # as memory that processes share
    back = unpack(packed)["one"]
    back.zero_()
    assert unpack(packed)["one"].tolist() == [1, 1, 1]
