"""Encoded data on disk: one safetensors file per source texts, tokenizer and settings.

The key covers the texts themselves, so a changed file, column, split or tokenizer is another entry. A file that is
damaged, or cannot be written, costs time only: the data is encoded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sfedlora.data.encoded import EncodedData
from sfedlora.sources import cache_root

__all__ = ["cached_encoding", "encoding_key"]

ENCODING_VERSION = 1  # raise it when the same input would be encoded differently

logger = logging.getLogger(__name__)


def encoding_key(
    texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, object]
) -> str | None:
    """Digest of everything that decides token ids, or None where a tokenizer's content cannot be digested.

    Args:
        texts: the text columns in use, each with one text per row.
        tokenizer: digested are its `tokenizers` state without padding and truncation, and its chat template.
        settings: JSON-able settings of the encoding.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # left over from the tokenizer's last call
    state.pop("padding", None)
    specials = [str(tokenizer.bos_token_id), str(tokenizer.eos_token_id), tokenizer.truncation_side]
    versions = [ENCODING_VERSION, transformers.__version__, tokenizers.__version__]
    head = [versions, dict(settings), state, tokenizer.chat_template, specials, tokenizer.model_input_names]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for column in texts:
        digest.update(f"column of {len(column)}:".encode())
        for text in column:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def cached_encoding(key: str | None, encode: Callable[[], EncodedData]) -> EncodedData:
    """The cached encoding of a key; made and stored by `encode` where it is missing or damaged."""
    if key is None:
        return encode()
    path = cache_root() / "encoded" / f"{key}.safetensors"
    cached = _load(path)
    if cached is not None:
        return cached
    encoded = encode()
    _store(encoded, path)
    return encoded


def _arrays(encoded: EncodedData) -> dict[str, NDArray[np.integer]]:
    named = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    return {name: array for name, array in named.items() if array is not None}


def _digest(arrays: Mapping[str, NDArray[np.integer]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}:{arrays[name].dtype}:{arrays[name].shape}:".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _load(path: Path) -> EncodedData | None:
    """The stored data, or None where the file is missing, damaged or of another layout."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping, has keys()
            stored = (file.metadata() or {}).get("sha256")
        if stored == _digest(arrays):
            return EncodedData(**arrays)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        logger.debug("encoding cache %s cannot be used: %s", path, error)
    return None


def _store(encoded: EncodedData, path: Path) -> None:
    arrays = _arrays(encoded)
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(save(arrays, metadata={"sha256": _digest(arrays)}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the encoding cannot be cached in %s (%s); it is made again next time", path.parent, error)
