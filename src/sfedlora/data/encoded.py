"""Encoded examples and the padded batches made from them.

Here: the flat storage of token ids and `collate`. Not here: tokenising (`encode`), which examples go into a batch
(`batches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.errors import DataError

__all__ = ["IGNORED_LABEL", "NO_EXAMPLES", "Batch", "EncodedData", "GroupedBatch", "collate", "collate_groups"]

IGNORED_LABEL = -100
NO_EXAMPLES: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


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

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
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


@dataclass(frozen=True)
class GroupedBatch:
    """The batches of several clients, each padded to the same rows and tokens, one after the other.

    Attributes:
        joined: the whole, (groups * rows, tokens). Rows that are padding hold one masked-in pad token and no label.
        own_shapes: (rows, tokens) of each group by itself.
        padded_shape: (rows, tokens) of every group here.
    """

    joined: Batch
    own_shapes: tuple[tuple[int, int], ...]
    padded_shape: tuple[int, int]


def collate_groups(encoded: EncodedData, groups: Sequence[NDArray[np.int64]], *, pad_token_id: int) -> GroupedBatch:
    """Pad the examples of each group to one batch of equal groups; a group may be empty.

    Args:
        encoded: all examples.
        groups: positions in `encoded`; at least one position in all.
        pad_token_id: id at the pad positions.

    Raises:
        DataError: no positions at all.
    """
    own = tuple((len(group), int(encoded.lengths[group].max()) if len(group) else 0) for group in groups)
    rows = max(shape[0] for shape in own)
    batch = collate(encoded, np.concatenate(groups), pad_token_id=pad_token_id)
    tokens = batch.input_ids.shape[1]
    if any(shape[0] < rows for shape in own):
        batch = _with_empty_rows(batch, [len(group) for group in groups], rows, pad_token_id)
    return GroupedBatch(batch, own, (rows, tokens))


def _with_empty_rows(batch: Batch, sizes: Sequence[int], rows: int, pad_token_id: int) -> Batch:
    """Rows without labels after each group of a batch, up to a common number."""
    real = np.concatenate([np.arange(rows) < size for size in sizes])

    def spread(values: Tensor, fill: int) -> Tensor:
        padded = torch.full((len(real), *values.shape[1:]), fill, dtype=values.dtype)
        padded[torch.from_numpy(real)] = values
        return padded

    attention_mask = spread(batch.attention_mask, 0)
    attention_mask[~torch.from_numpy(real), 0] = 1  # attention over nothing is not a number
    token_type_ids = None if batch.token_type_ids is None else spread(batch.token_type_ids, 0)
    input_ids = spread(batch.input_ids, pad_token_id)
    return replace(
        batch,
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=spread(batch.labels, IGNORED_LABEL),
        num_padded=input_ids.numel() - batch.num_tokens,
        token_type_ids=token_type_ids,
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
