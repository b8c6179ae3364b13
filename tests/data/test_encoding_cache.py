from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfedlora.data.encode import encode_causal, encode_classification
from sfedlora.data.encoded import EncodedData
from sfedlora.data.encoding_cache import cached_encoding, encoding_key
from sfedlora.data.examples import Examples
from sfedlora.sources import cache_root
from support.tiny_tokenizers import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EXAMPLES = Examples({"p": ["what is it?", "the dog"], "r": ["a fox", "one"], "l": [0, 1]}, "file", "")


def encode(examples: Examples = EXAMPLES) -> EncodedData:
    return encode_causal(examples, TOKENIZER, prompt="p", response="r", max_length=20)


def files() -> list[Path]:
    return sorted((cache_root() / "encoded").glob("*"))


def same(one: EncodedData, two: EncodedData) -> bool:
    return (
        np.array_equal(one.tokens, two.tokens)
        and np.array_equal(one.offsets, two.offsets)
        and one.label_starts is not None
        and two.label_starts is not None
        and np.array_equal(one.label_starts, two.label_starts)
        and [one.tokens.dtype, one.offsets.dtype, one.label_starts.dtype]
        == [two.tokens.dtype, two.offsets.dtype, two.label_starts.dtype]
    )


def refuse() -> EncodedData:
    raise RuntimeError("encoded again")


def test_second_time_comes_from_disk() -> None:
    first = encode()
    (file,) = files()
    assert same(cached_encoding(file.stem, refuse), first)
    assert same(encode(), first)
    assert files() == [file]
    assert [entry.suffix for entry in files()] == [".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "folder"])
def test_damaged_file_is_made_again(damage: str) -> None:
    first = encode()
    (file,) = files()
    raw = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        changed = {"cut": raw[:-5], "empty": b"", "garbage": b"\xff" * 64, "flipped": raw[:-1] + bytes([raw[-1] ^ 1])}
        file.write_bytes(changed[damage])
    assert same(encode(), first)
    if damage != "folder":
        assert file.read_bytes() == raw


def test_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFEDLORA_CACHE", str(tmp_path / "file"))
    assert len(encode()) == 2
    assert "cannot be cached" in caplog.text


def test_labels_are_not_cached_with_the_texts() -> None:
    swapped = Examples({**EXAMPLES.columns, "l": [1, 0]}, "file", "")
    for examples, expected in ((EXAMPLES, [0, 1]), (swapped, [1, 0])):
        data, _ = encode_classification(
            examples, TOKENIZER, text="p", text_pair=None, label="l", labels=None, max_length=9
        )
        assert data.labels is not None
        assert data.labels.tolist() == expected
    assert len(files()) == 1


def test_key_covers_texts_settings_and_tokenizer() -> None:
    keys = [
        encoding_key([["a", "b"]], TOKENIZER, {"max_length": 4}),
        encoding_key([["ab", ""]], TOKENIZER, {"max_length": 4}),
        encoding_key([["a"], ["b"]], TOKENIZER, {"max_length": 4}),
        encoding_key([["a", "b"]], TOKENIZER, {"max_length": 5}),
        encoding_key([["a", "b"]], tiny_tokenizer(bos=True), {"max_length": 4}),
        encoding_key([["a", "b"]], tiny_tokenizer(eos=None), {"max_length": 4}),
        encoding_key([["a", "b"]], tiny_tokenizer(chat_template=CHATML), {"max_length": 4}),
    ]
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_what_the_tokenizer_did_before() -> None:
    tokenizer = tiny_tokenizer()
    before = encoding_key([["a"]], tokenizer, {})
    tokenizer(["a b c", "d"], padding="max_length", truncation=True, max_length=2)
    assert encoding_key([["a"]], tokenizer, {}) == before
    assert encoding_key([["a"]], tiny_tokenizer(), {}) == before
