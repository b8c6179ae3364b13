from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.data.encoded import NO_EXAMPLES, EncodedData, collate, collate_groups
from sfedlora.errors import DataError


def encoded_rows(
    rows: list[list[int]], starts: list[int] | None = None, labels: list[int] | None = None
) -> EncodedData:
    return EncodedData(
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.array([sum(len(row) for row in rows[:i]) for i in range(len(rows) + 1)], dtype=np.int64),
        label_starts=None if starts is None else np.array(starts, dtype=np.int32),
        labels=None if labels is None else np.array(labels, dtype=np.int64),
    )


def test_causal_batch_by_hand() -> None:
    data = encoded_rows([[7, 8, 9], [5, 6], [1, 2, 3, 4, 5]], starts=[1, 1, 3])
    assert len(data) == 3
    assert data.lengths.tolist() == [3, 2, 5]
    assert data.num_label_tokens.tolist() == [2, 1, 2]
    batch = collate(data, [2, 1], pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [5, 6, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 4, 5], [-100, 6, -100, -100, -100]]
    assert (batch.num_tokens, batch.num_padded, batch.num_labels) == (7, 3, 3)
    assert batch.token_type_ids is None
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_classification_batch_by_hand() -> None:
    data = encoded_rows([[7, 8, 9], [5, 6]], labels=[1, 0])
    batch = collate(data, np.array([1, 0]), pad_token_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 3], [7, 8, 9]]
    assert batch.labels.tolist() == [0, 1]
    assert (batch.num_tokens, batch.num_padded, batch.num_labels) == (5, 1, 2)


def test_token_types() -> None:
    plain = encoded_rows([[1, 2, 3], [4, 5]], labels=[0, 1])
    data = EncodedData(plain.tokens, plain.offsets, None, plain.labels, np.array([1, 2], dtype=np.int32))
    types = collate(data, [0, 1], pad_token_id=0).token_type_ids
    assert types is not None
    assert types.tolist() == [[0, 1, 1], [0, 0, 0]]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=9), min_size=1, max_size=8), st.data())
def test_every_token_is_there_once(rows: list[list[int]], draw: st.DataObject) -> None:
    starts = [draw.draw(st.integers(1, len(row) - 1)) for row in rows]
    indices = draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    batch = collate(encoded_rows(rows, starts), indices, pad_token_id=rows[0][0])
    assert batch.input_ids.shape[1] == max(len(rows[i]) for i in indices)
    for place, i in enumerate(indices):
        mask = batch.attention_mask[place].bool()
        assert batch.input_ids[place][mask].tolist() == rows[i]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        labelled = batch.labels[place] != -100
        assert batch.labels[place][labelled].tolist() == rows[i][starts[i] :]
        assert labelled.nonzero()[:, 0].tolist() == list(range(starts[i], len(rows[i])))
    assert batch.num_tokens + batch.num_padded == batch.input_ids.numel()
    assert batch.num_tokens == int(batch.attention_mask.sum())
    assert batch.num_labels == int((batch.labels != -100).sum())


def test_empty_batch_is_refused() -> None:
    with pytest.raises(DataError, match="at least one example"):
        collate(encoded_rows([[1, 2]], [1]), [], pad_token_id=0)


def test_groups_by_hand() -> None:
    data = encoded_rows([[7, 8, 9], [5, 6], [1, 2, 3, 4, 5]], starts=[1, 1, 3])
    grouped = collate_groups(data, [np.array([1, 0]), NO_EXAMPLES, np.array([2])], pad_token_id=0)
    assert grouped.own_shapes == ((2, 3), (0, 0), (1, 5))
    assert grouped.padded_shape == (2, 5)
    batch = grouped.joined
    assert batch.input_ids.tolist() == [
        [5, 6, 0, 0, 0],
        [7, 8, 9, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5],
        [0, 0, 0, 0, 0],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0],  # attention over nothing is not a number
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        [-100, 6, -100, -100, -100],
        [-100, 8, 9, -100, -100],
        [-100] * 5,
        [-100] * 5,
        [-100, -100, -100, 4, 5],
        [-100] * 5,
    ]
    assert (batch.num_tokens, batch.num_padded, batch.num_labels) == (10, 20, 5)


def test_groups_of_classes_and_token_types() -> None:
    plain = encoded_rows([[1, 2, 3], [4, 5], [6]], labels=[2, 1, 0])
    data = EncodedData(plain.tokens, plain.offsets, None, plain.labels, np.array([1, 2, 1], dtype=np.int32))
    batch = collate_groups(data, [np.array([0, 2]), np.array([1])], pad_token_id=9).joined
    assert batch.labels.tolist() == [2, 0, 1, -100]
    assert batch.input_ids.tolist() == [[1, 2, 3], [6, 9, 9], [4, 5, 9], [9, 9, 9]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4).filter(any))
def test_a_group_is_its_own_batch_and_padding(groups: list[list[int]]) -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 1], [2, 3, 4, 5, 6, 7], [8, 9, 1]]
    data = encoded_rows(rows, starts=[1, 1, 2, 1, 4, 2])
    grouped = collate_groups(data, [np.array(group, dtype=np.int64) for group in groups], pad_token_id=0)
    height, width = grouped.padded_shape
    batch = grouped.joined
    assert batch.input_ids.shape == (height * len(groups), width)
    assert batch.num_tokens + batch.num_padded == batch.input_ids.numel()
    for place, (group, own) in enumerate(zip(groups, grouped.own_shapes, strict=True)):
        share = slice(place * height, (place + 1) * height)
        assert own[0] == len(group)
        if group:
            alone = collate(data, group, pad_token_id=0)
            assert own == tuple(alone.input_ids.shape)
            for name in ("input_ids", "attention_mask", "labels"):
                mine = getattr(batch, name)[share][: own[0], : own[1]]
                assert mine.equal(getattr(alone, name))
        rest = batch.labels[share].clone()
        rest[: own[0], : own[1]] = -100
        assert bool((rest == -100).all())
        assert batch.attention_mask[share][own[0] :].sum(dim=1).tolist() == [1] * (height - own[0])


def test_groups_without_any_example_are_refused() -> None:
    with pytest.raises(DataError, match="at least one example"):
        collate_groups(encoded_rows([[1, 2]], [1]), [NO_EXAMPLES, NO_EXAMPLES], pad_token_id=0)
