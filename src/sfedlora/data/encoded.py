"""Encoded examples and the padded batches made from them.

Here: the flat storage of token ids and `collate`. Not here: tokenising (`encode`), which examples go into a batch
(`batches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.errors import DataError

__all__ = ["IGNORED_LABEL", "Batch", "EncodedData", "collate"]

IGNORED_LABEL = -100


@dataclass(frozen=True)
class EncodedData:
    """Token ids of n rows of a source, in its order, in one flat array; one of `label_starts` and `labels` is given.

    Attributes:
        tokens: (total tokens,) int32; example i is `tokens[offsets[i]:offsets[i + 1]]`.
        offsets: (n + 1,) int64.
        label_starts: (n,) int32, causal language modelling: position of the first labelled token; all later ones are
            labelled too. At least 1, because nothing predicts the token at position 0.
        labels: (n,) int64, classification: class ids.
        second_starts: (n,) int32, text pairs of models with token types: position where type 1 begins.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    label_starts: NDArray[np.int32] | None = None
    labels: NDArray[np.int64] | None = None
    second_starts: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each example."""
        return np.diff(self.offsets)

    @property
    def num_label_tokens(self) -> NDArray[np.int64]:
        """(n,) labelled tokens of each example; 1 each for classification (its label)."""
        if self.label_starts is None:
            return np.ones(len(self), dtype=np.int64)
        return self.lengths - self.label_starts

    def example_tokens(self, index: int) -> NDArray[np.int32]:
        """(length,) token ids of one example, not copied."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Batch:
    """B examples padded at the right to length L.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 on real tokens.
        labels: (B, L) int64, -100 where there is no label, unshifted as Hugging Face models expect; or (B,) class ids.
        num_tokens: real tokens.
        num_padded: pad positions besides; `num_tokens + num_padded` is B * L.
        num_labels: labelled tokens, or B for classification.
        token_type_ids: (B, L) int64 for text pairs of models that know token types (BERT), else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    num_tokens: int
    num_padded: int
    num_labels: int
    token_type_ids: Tensor | None = None


def collate(encoded: EncodedData, indices: Sequence[int] | NDArray[np.int64], *, pad_token_id: int) -> Batch:
    """Pad some examples to one batch as wide as the longest of them, in the order given.

    Args:
        encoded: all examples.
        indices: positions in `encoded`, at least one.
        pad_token_id: id at the pad positions (masked and unlabelled there).

    Raises:
        DataError: no indices.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if chosen.size == 0:
        raise DataError("a batch needs at least one example, got none")
    lengths = encoded.lengths[chosen]
    real = np.arange(int(lengths.max())) < lengths[:, None]
    input_ids = np.full(real.shape, pad_token_id, dtype=np.int64)
    input_ids[real] = np.concatenate([encoded.example_tokens(index) for index in chosen])
    num_tokens = int(lengths.sum())
    labels = _labels(encoded, chosen, input_ids, real)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        labels=torch.from_numpy(labels),
        num_tokens=num_tokens,
        num_padded=input_ids.size - num_tokens,
        num_labels=int(encoded.num_label_tokens[chosen].sum()),
        token_type_ids=_token_types(encoded, chosen, real),
    )


def _labels(
    encoded: EncodedData, chosen: NDArray[np.int64], input_ids: NDArray[np.int64], real: NDArray[np.bool_]
) -> NDArray[np.int64]:
    if encoded.labels is not None:
        return encoded.labels[chosen]
    if encoded.label_starts is None:
        raise DataError("encoded data without labels: neither label_starts nor labels is given")
    labelled = real & (np.arange(real.shape[1]) >= encoded.label_starts[chosen, None])
    return np.where(labelled, input_ids, IGNORED_LABEL)


def _token_types(encoded: EncodedData, chosen: NDArray[np.int64], real: NDArray[np.bool_]) -> Tensor | None:
    if encoded.second_starts is None:
        return None
    second = real & (np.arange(real.shape[1]) >= encoded.second_starts[chosen, None])
    return torch.from_numpy(second.astype(np.int64))
