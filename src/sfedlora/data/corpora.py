"""Readers that turn corpora shipped inside packages into rows, for demos, recipes and tests.

Nothing of the packages is imported and no content of theirs is kept here: only their files are read. Rows are plain
dictionaries of strings; `write_jsonl` makes them a source for `load_examples`.

References:
    Cox, ChatterBot Corpus (package chatterbot-corpus, BSD licence).
    Myers et al., Chit Chat Challenge data set, 2018 (package chitchat-dataset, MIT licence).
    Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014
    (sdist of package vaderSentiment, MIT licence).
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sfedlora.data.files import read_text
from sfedlora.errors import DataError, StorageError
from sfedlora.storage import write_text

__all__ = ["chatterbot_rows", "chitchat_rows", "hutto_rows", "write_jsonl"]

HUTTO_DOMAINS = {
    "amazonReviewSnippets": "products",
    "movieReviewSnippets": "movies",
    "nytEditorialSnippets": "editorials",
    "tweets": "tweets",
}
HUTTO_MIN_SCORE = 0.5

logger = logging.getLogger(__name__)


def chatterbot_rows(folder: Path) -> list[dict[str, str]]:
    """Prompt and reply pairs of chatterbot YAML files: `{prompt, response, topic}`.

    Consecutive turns of a conversation are a pair (a turn `Yes` or `22` is that text); the topic is the file's stem.
    An entry of `conversations` that is no list of turns (the shipped trivia.yml has one) is left out and logged, a
    pair with an empty turn is left out.

    Args:
        folder: a directory of .yml / .yaml files, read in name order with its subdirectories, or one such file.

    Raises:
        DataError: not found, not UTF-8, not YAML (with the line), or no `conversations` key.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.yml")) + sorted(folder.rglob("*.yaml"))
    if not files:
        raise DataError(f"{folder}: no .yml files there; expected chatterbot conversation files")
    return [row for file in files for row in _conversation_rows(file)]


def chitchat_rows(path: Path) -> list[dict[str, str]]:
    """Dialogue replies of chitchat_dataset/dataset.json: `{prompt, response, speaker, conversation}`.

    A turn is one speaker's consecutive messages joined by a space. The prompt is the turn before, the response the
    reply, the speaker who replies. Pairs with an empty turn are left out.

    Raises:
        DataError: not found, not UTF-8, not JSON, or of another layout.
    """
    try:
        conversations = json.loads(read_text(path))
        rows: list[dict[str, str]] = []
        for name, conversation in conversations.items():
            turns = [
                (turn[0]["sender"], " ".join(message["text"] for message in turn).strip())
                for turn in conversation["messages"]
            ]
            rows += [
                {"prompt": before, "response": reply, "speaker": speaker, "conversation": name}
                for (_, before), (speaker, reply) in pairwise(turns)
                if before and reply
            ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: not the chitchat data set ({type(error).__name__}: {error})") from error
    return rows


def hutto_rows(tar_gz_path: Path) -> list[dict[str, str]]:
    """Sentences with a clear mean sentiment from hutto_ICWSM_2014.tar.gz: `{text, label, domain}`.

    The label is the sign of the raters' mean score in [-4, 4], "positive" or "negative"; sentences with a mean closer
    to zero than 0.5 are left out. Domains: products, movies, editorials, tweets. The archive is read in place.

    Raises:
        DataError: not found, not such an archive, or a malformed line.
    """
    rows: list[dict[str, str]] = []
    try:
        with tarfile.open(tar_gz_path, "r:gz") as archive:
            for stem, domain in HUTTO_DOMAINS.items():
                member = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
                if member is None:
                    raise DataError(f"{tar_gz_path}: {stem}_GroundTruth.txt is not a file")
                lines = member.read().decode("utf-8-sig").split("\n")
                rows += [row for line in lines if line.strip() for row in _sentiment_rows(line, domain)]
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{tar_gz_path}: not the archive hutto_ICWSM_2014.tar.gz ({error})") from error
    return rows


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows as JSON Lines; the file appears complete or not at all.

    Raises:
        StorageError: the file could not be written; an older one of that name is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _conversation_rows(file: Path) -> list[dict[str, str]]:
    try:
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)  # noqa: S506 - makes strings, lists, dicts only
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise DataError(f"{file}: line {line} is not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("conversations"), list):
        raise DataError(f"{file}: expected a key 'conversations' with a list of conversations (lists of turns)")
    rows: list[dict[str, str]] = []
    for number, turns in enumerate(content["conversations"]):
        if not isinstance(turns, list):
            logger.info("%s: conversation %d is no list of turns and is left out", file, number)
            continue
        texts = [turn.strip() if isinstance(turn, str) else "" for turn in turns]
        rows += [
            {"prompt": prompt, "response": response, "topic": file.stem}
            for prompt, response in pairwise(texts)
            if prompt and response
        ]
    return rows


def _sentiment_rows(line: str, domain: str) -> list[dict[str, str]]:
    _, score, text = line.rstrip("\r").split("\t")
    mean = float(score)
    if abs(mean) < HUTTO_MIN_SCORE or not text.strip():
        return []
    return [{"text": text.strip(), "label": "positive" if mean > 0 else "negative", "domain": domain}]
