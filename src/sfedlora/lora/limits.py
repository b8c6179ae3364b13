"""What a model can read: how many token ids, and how many tokens at once.

Beyond either a model fails in the middle of training with an index error, so both are checked before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

__all__ = ["InputLimits", "input_limits"]

_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "position_embedding")
_OPT_TABLE, _OPT_OFFSET = "OPTLearnedPositionalEmbedding", 2


@dataclass(frozen=True)
class InputLimits:
    """Limits on one example.

    Attributes:
        num_embeddings: token ids are 0 .. num_embeddings - 1.
        max_tokens: longest example where positions are embedded; None where they are computed (rotary, relative).
    """

    num_embeddings: int
    max_tokens: int | None


def input_limits(model: PreTrainedModel) -> InputLimits:
    """The limits of a model, read from its embeddings.

    A table of positions has one row per token; RoBERTa and its kin begin to count after their padding index, OPT at 2.
    """
    num_embeddings: int = model.get_input_embeddings().num_embeddings
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES
    ]
    usable = [table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    if usable and _OPT_TABLE in {type(table).__name__ for table in tables}:
        usable = [size - _OPT_OFFSET for size in usable]
    return InputLimits(num_embeddings, min(usable, default=None))
