from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfedlora.data.encoded import EncodedData, collate
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
