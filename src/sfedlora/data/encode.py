"""From rows to token ids, for causal language modelling and sequence classification.

The encoding of a row depends on that row, the tokenizer and the settings only. Special tokens are added here, once;
prompt and response are tokenised separately, so the prompt's ids at training and at generation are the same.
Batches of encoded examples are made by `collate` (module `encoded`), templates live in `templates`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sfedlora.data.encoded import Batch, EncodedData, collate
from sfedlora.data.encoding_cache import cached_encoding, encoding_key
from sfedlora.data.examples import Examples
from sfedlora.data.labels import number_labels
from sfedlora.data.templates import Template, bos_ids, render_prompt, render_prompts, response_frame, tokenize
from sfedlora.errors import DataError

__all__ = ["Batch", "EncodedData", "collate", "encode_causal", "encode_classification", "render_prompt"]

BLOCK_ROWS = 1000


def encode_causal(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str | None,
    response: str,
    template: Template = "plain",
    loss_on: Literal["response", "all"] = "response",
    max_length: int,
) -> EncodedData:
    """Encode prompt and response rows for next-token training; example i is row i.

    An example longer than `max_length` loses the start of its prompt first (a begin-of-sequence token and at least one
    token before the response stay), then the end of its response. None is dropped.

    Args:
        examples: the rows.
        tokenizer: of the base model. One without an end-of-sequence token ends no response.
        prompt: column of the prompts. None: plain language modelling on `response`, which then is the whole text.
        response: column of the responses.
        template: see `templates`.
        loss_on: label the response with its end, or every token but the first.
        max_length: longest example in tokens, at least 2.

    Raises:
        DataError: a missing column, a text that is no string or holds invalid Unicode, an empty response (all with
            their row), a chat template that is missing, `max_length` under 2.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2: one token to read, one to predict")
    if prompt is None and template != "plain":
        raise DataError(f"template {template!r} needs a prompt column; name one or use template 'plain'")
    responses = _texts(examples, response, empty_allowed=False)
    prompts = None if prompt is None else _texts(examples, prompt, empty_allowed=True)
    settings = {"task": "causal", "template": template, "loss_on": loss_on, "max_length": max_length}
    key = encoding_key([responses] if prompts is None else [prompts, responses], tokenizer, settings)

    def encode_block(block: slice) -> EncodedData:
        block_prompts = None if prompts is None else prompts[block]
        heads, bodies = _heads_and_bodies(block_prompts, responses[block], template, tokenizer)
        bos = tokenizer.bos_token_id
        pairs = [_fitted(head, body, bos, max_length) for head, body in zip(heads, bodies, strict=True)]
        starts = [1 if loss_on == "all" else max(1, len(head)) for head, _ in pairs]
        rows = [head + body for head, body in pairs]
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True), start=block.start):
            if len(ids) <= start:
                raise DataError(f"{_where(examples, response)}: row {row} has no token to predict: {responses[row]!r}")
        return _packed(rows, label_starts=np.array(starts, dtype=np.int32))

    return cached_encoding(key, lambda: _in_blocks(len(responses), encode_block))


def encode_classification(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    text_pair: str | None,
    label: str,
    labels: Sequence[str | int] | None,
    max_length: int,
) -> tuple[EncodedData, tuple[str, ...]]:
    """Encode texts or pairs of texts with their class; example i is row i.

    Special tokens are the tokenizer's own. Too long: a single text loses its end, of a pair the longer text does.

    Args:
        examples: the rows.
        tokenizer: of the base model.
        text: column of the (first) texts.
        text_pair: column of the second texts, or None.
        label: column of the labels: integers or strings.
        labels: label values in the order of their ids. None: the names that the source declares, else the sorted
            distinct values.
        max_length: longest example in tokens.

    Returns:
        The encoded data and the label names in the order of their ids.

    Raises:
        DataError: a missing column, a text that is no string, a label that cannot be used (with row and value), a text
            without tokens, `max_length` that leaves no room for text.
    """
    columns = [_texts(examples, name, empty_allowed=True) for name in (text, text_pair) if name is not None]
    names = labels if labels is not None else examples.class_names.get(label)
    ids, label_names = number_labels(examples.column(label), names, where=_where(examples, label))
    needed = tokenizer.num_special_tokens_to_add(pair=text_pair is not None) + len(columns)
    if max_length < needed:
        raise DataError(f"max_length is {max_length}; this tokenizer needs at least {needed}")
    key = encoding_key(columns, tokenizer, {"task": "classification", "max_length": max_length})

    def encode_block(block: slice) -> EncodedData:
        rows, second_starts = _tokenize_classification([column[block] for column in columns], tokenizer, max_length)
        for row, tokens in enumerate(rows, start=block.start):
            if not tokens:
                raise DataError(f"{_where(examples, text)}: row {row} has no tokens: {columns[0][row]!r}")
        return _packed(rows, second_starts=second_starts)

    encoded = cached_encoding(key, lambda: _in_blocks(len(columns[0]), encode_block))
    return (
        EncodedData(encoded.tokens, encoded.offsets, None, ids, encoded.second_starts),
        label_names,
    )


def _texts(examples: Examples, name: str, *, empty_allowed: bool) -> list[str]:
    """A column whose values must all be usable text."""
    where = _where(examples, name)
    values = examples.column(name)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            kind = "is missing" if value is None else f"is {value!r} ({type(value).__name__})"
            raise DataError(f"{where}: the value in row {row} {kind}; expected text")
        if not empty_allowed and not value.strip():
            raise DataError(f"{where}: the text in row {row} is empty; fill it or remove the row")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the text in row {row} holds invalid Unicode ({error.reason})") from error
    return values


def _heads_and_bodies(
    prompts: Sequence[str] | None, responses: Sequence[str], template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids before the response, and of the response with its end, for every row."""
    heads = [bos_ids(tokenizer)] * len(responses) if prompts is None else render_prompts(prompts, template, tokenizer)
    frame = response_frame(template, tokenizer)
    bodies = tokenize([f"{frame.before}{response}{frame.after}" for response in responses], tokenizer)
    return heads, [body + list(frame.end_ids) for body in bodies]


def _fitted(head: list[int], body: list[int], bos: int | None, max_length: int) -> tuple[list[int], list[int]]:
    """Cut the prompt at its start, then the response at its end, so that both fit."""
    if len(head) + len(body) <= max_length:
        return head, body
    keep = min(len(head), max(1, max_length - len(body)))
    if keep < len(head):
        first = head[:1] if head[0] == bos else head[len(head) - keep : len(head) - keep + 1]
        head = first + head[len(head) - keep + 1 :]
    return head, body[: max_length - len(head)]


def _tokenize_classification(
    columns: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], NDArray[np.int32] | None]:
    """Token ids with special tokens, and where the second text begins if the model wants to know."""
    typed = len(columns) == 2 and "token_type_ids" in tokenizer.model_input_names
    rows: list[list[int]] = []
    starts: list[int] = []
    if columns[0]:
        encoding = tokenizer(
            *(list(column) for column in columns),
            truncation=True,
            max_length=max_length,
            return_token_type_ids=typed,
            verbose=False,
        )
        rows = encoding["input_ids"]
        starts = [types.index(1) if 1 in types else len(types) for types in encoding["token_type_ids"]] if typed else []
    return rows, np.array(starts, dtype=np.int32) if typed else None


def _in_blocks(num_rows: int, encode_block: Callable[[slice], EncodedData]) -> EncodedData:
    """Encode rows block by block: token ids as Python objects take some ten times the memory of the arrays."""
    blocks = [encode_block(slice(start, start + BLOCK_ROWS)) for start in range(0, max(num_rows, 1), BLOCK_ROWS)]
    return EncodedData(
        np.concatenate([block.tokens for block in blocks]),
        np.concatenate([[0], np.cumsum(np.concatenate([block.lengths for block in blocks]))]),
        _concatenated([block.label_starts for block in blocks]),
        None,
        _concatenated([block.second_starts for block in blocks]),
    )


def _concatenated(arrays: Sequence[NDArray[np.int32] | None]) -> NDArray[np.int32] | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None


def _packed(
    rows: Sequence[Sequence[int]],
    *,
    label_starts: NDArray[np.int32] | None = None,
    second_starts: NDArray[np.int32] | None = None,
) -> EncodedData:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    return EncodedData(tokens, offsets, label_starts, None, second_starts)


def _where(examples: Examples, column: str) -> str:
    return f"{examples.source}, column {column!r}"
