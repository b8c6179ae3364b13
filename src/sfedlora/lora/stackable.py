"""Which target modules can carry the pairs of several clients: those that see whole batches.

A stack knows a client's rows by their place in the batch. Some models apply a linear module to something else as well:
position embeddings that all examples share (DeBERTa), or the tokens that a router picked (mixtures of experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["unstackable_targets"]

_ROWS, _TOKENS = 3, 5


@torch.no_grad()
def unstackable_targets(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Those of some modules that a small batch does not reach with all its rows; found by running it.

    A module that is not called at all is not among them.

    Args:
        model: stock or adapted; nothing is left on it.
        paths: modules of it.
    """
    found: set[str] = set()
    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(_note_if_stray, found, path)) for path in paths
    ]
    ids = torch.arange(_ROWS * _TOKENS, device=model.device).view(_ROWS, _TOKENS) % 7 + 1
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in paths if path in found]


def _note_if_stray(found: set[str], path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0].shape[0] not in {_ROWS, _ROWS * _TOKENS}:
        found.add(path)
