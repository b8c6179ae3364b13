from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from sfedlora.data.corpora import chatterbot_rows, chitchat_rows, hutto_rows, write_jsonl
from sfedlora.data.examples import load_examples
from sfedlora.errors import DataError, StorageError
from sfedlora.sources import local_path


def test_chitchat_joins_messages_and_names_who_replies(tmp_path: Path) -> None:
    def turn(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": sender, "timestamp": "t"} for text in texts]

    turns = [turn("ann", "hi", "you?"), turn("bob", "fine"), turn("ann", " "), turn("bob", "hm", "ok")]
    (tmp_path / "dataset.json").write_text(json.dumps({"talk-1": {"messages": turns}, "talk-2": {"messages": []}}))
    assert chitchat_rows(tmp_path / "dataset.json") == [
        {"prompt": "hi you?", "response": "fine", "speaker": "bob", "conversation": "talk-1"}
    ]


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '{"a": {"messages": [[]]}}', "{"])
def test_chitchat_of_another_layout(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match="not the chitchat data set"):
        chitchat_rows(tmp_path / "dataset.json")


def hutto_archive(path: Path, texts: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for stem, raw in texts.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


STEMS = ["amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets"]


def test_hutto_keeps_clear_scores(tmp_path: Path) -> None:
    lines = "\ufeff1_1\t-0.5\tbad \r\n1_2\t0.49\tmeh\r\n1_3\t2.5\tgood\r\n".encode()
    archive = hutto_archive(tmp_path / "h.tar.gz", dict.fromkeys(STEMS, lines))
    rows = hutto_rows(archive)
    assert rows[:2] == [
        {"text": "bad", "label": "negative", "domain": "products"},
        {"text": "good", "label": "positive", "domain": "products"},
    ]
    assert [row["domain"] for row in rows[2:]] == ["movies", "movies", "editorials", "editorials", "tweets", "tweets"]


def test_hutto_that_is_not_the_archive(tmp_path: Path) -> None:
    whole = hutto_archive(tmp_path / "h.tar.gz", dict.fromkeys(STEMS, b"1\t2.0\tgood\n" * 500))
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.tar.gz").write_text("no archive")
    hutto_archive(tmp_path / "short.tar.gz", {"tweets": b""})
    hutto_archive(tmp_path / "columns.tar.gz", dict.fromkeys(STEMS, b"only one column\n"))
    for name in ("cut.tar.gz", "text.tar.gz", "short.tar.gz", "columns.tar.gz", "nosuch.tar.gz"):
        with pytest.raises(DataError, match=r"not the archive hutto_ICWSM_2014\.tar\.gz"):
            hutto_rows(tmp_path / name)


def test_write_jsonl_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "ä\u2028\n", "label": "x"}, {"text": "b", "label": "y"}]
    write_jsonl(rows, tmp_path / "new" / "rows.jsonl")
    assert load_examples(str(tmp_path / "new" / "rows.jsonl")).column("text") == ["ä\u2028\n", "b"]


def test_write_jsonl_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl([{"a": 1}], path)
    with pytest.raises(TypeError):
        write_jsonl([{"a": 2}, {"a": object()}], path)
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_write_jsonl_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_jsonl([{"a": 1}], tmp_path / "file" / "rows.jsonl")


@pytest.mark.skipif(find_spec("chatterbot_corpus") is None, reason="needs pip install --no-deps chatterbot-corpus")
def test_shipped_chatterbot() -> None:
    folder = local_path("package:chatterbot_corpus/data/english")
    assert folder is not None
    rows = chatterbot_rows(folder)
    topics = Counter(row["topic"] for row in rows)
    assert len(rows) == 2306
    assert len(topics) == 21
    assert topics["ai"] == 105
    assert topics["trivia"] == 260
    assert rows[0]["prompt"] == "What is AI?"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("chitchat_dataset") is None, reason="needs pip install --no-deps chitchat-dataset")
def test_shipped_chitchat() -> None:
    path = local_path("package:chitchat_dataset/dataset.json")
    assert path is not None
    rows = chitchat_rows(path)
    replies = Counter(row["speaker"] for row in rows)
    assert len(rows) == 131_548
    assert sum(count >= 100 for count in replies.values()) == 182
