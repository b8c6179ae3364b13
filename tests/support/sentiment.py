"""A sentiment task in a few kilobytes: the columns of the real one, a small random BERT, sentences of sixty words."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from support.command_line import write_config

__all__ = ["sentiment_rows", "write_sentiment"]

SUBJECTS = {
    "movies": ["the movie", "this film", "that story", "its plot"],
    "products": ["the phone", "this camera", "my radio", "the battery"],
    "editorials": ["the article", "this policy", "that speech", "our mayor"],
    "tweets": ["my day", "this game", "our team", "the weather"],
}
WORDS = {
    "positive": ["great", "good", "lovely", "fun", "superb", "nice"],
    "negative": ["bad", "awful", "dull", "poor", "sad", "broken"],
}
DEGREES = ["is", "is very", "was really"]


def sentiment_rows() -> list[dict[str, str]]:
    """Rows with `text`, `label` and `domain`, the labels mixed."""
    rows = []
    for domain, subjects in SUBJECTS.items():
        for at, (subject, degree) in enumerate(itertools.product(subjects, DEGREES)):
            for label, words in WORDS.items():
                for word in (words[at % 6], words[(at + 2) % 6]):
                    rows.append({"text": f"{subject} {degree} {word}", "label": label, "domain": domain})
    return rows


def write_sentiment(folder: Path, **sections: object) -> Path:
    """Model, tokenizer, rows and a run.yaml of three clients in a folder; the run goes to `folder / "run"`."""
    rows = sentiment_rows()
    model = folder / "model"
    tokenizer = _tokenizer([row["text"] for row in rows])
    tokenizer.save_pretrained(model)
    _bert(len(tokenizer)).save_pretrained(model)
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return write_config(
        folder / "run.yaml",
        model={"source": str(model), "task": "sequence-classification"},
        data={"source": str(source)},
        partition={"scheme": "iid", "column": None, "num_clients": 3},
        local={"local_steps": 8, "learning_rate": 1e-2, "batch_size": 8},
        output=str(folder / "run"),
        **sections,
    )


def _bert(vocab_size: int) -> BertForSequenceClassification:
    """Random weights large enough that a frozen random encoder passes its words on to the head."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
