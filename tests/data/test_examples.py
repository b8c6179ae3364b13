from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from sfedlora.data.examples import load_examples
from sfedlora.errors import DataError

ROWS = [{"prompt": "one", "response": "eins"}, {"prompt": "two\u2028lines", "response": 'zwei, "2"'}]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def message_of(source: str, *, subset: str | None = None, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_examples(source, subset=subset, split=split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def as_jsonl(path: Path) -> str:
    return write(path / "rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")


def as_json(path: Path) -> str:
    return write(path / "rows.json", json.dumps(ROWS, indent=2))


def as_json_lines_in_json(path: Path) -> str:
    return write(path / "lines.json", "\r\n".join(json.dumps(row) for row in ROWS))


def as_csv(path: Path) -> str:
    return write(path / "rows.csv", '\ufeffprompt,response\r\none,eins\r\ntwo\u2028lines,"zwei, ""2"""\r\n')


def as_csv_after_blank_lines(path: Path) -> str:
    return write(path / "blank.csv", '\n\nprompt,response\none,eins\n\ntwo\u2028lines,"zwei, ""2"""')


def as_tsv(path: Path) -> str:
    return write(path / "rows.tsv", 'prompt\tresponse\none\teins\ntwo\u2028lines\t"zwei, ""2"""\n')


def as_parquet(path: Path) -> str:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path / "rows.parquet")
    return str(path / "rows.parquet")


def as_yaml(path: Path) -> str:
    return write(path / "rows.yml", json.dumps({"conversations": [list(row.values()) for row in ROWS]}))


@pytest.mark.parametrize(
    "make", [as_jsonl, as_json, as_json_lines_in_json, as_csv, as_csv_after_blank_lines, as_tsv, as_parquet, as_yaml]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, make: Callable[[Path], str]) -> None:
    source = make(tmp_path)
    examples = load_examples(source)
    assert len(examples) == 2
    assert examples.column("prompt") == ["one", "two\u2028lines"]
    assert examples.column("response") == ["eins", 'zwei, "2"']
    assert examples.source == source
    assert examples.sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()


def test_yaml_turns_are_pairs_with_topic_and_stay_text(tmp_path: Path) -> None:
    text = "conversations:\n- - Is it?\n  - Yes\n  - 22\n- no list\n- - alone\n- - asked\n  - ''\n"
    examples = load_examples(write(tmp_path / "quiz.yml", text))
    assert examples.column("prompt") == ["Is it?", "Yes"]
    assert examples.column("response") == ["Yes", "22"]
    assert examples.column("topic") == ["quiz", "quiz"]


def test_directory_of_yaml_is_read_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "b.yml", "conversations: [[x, y]]")
    write(tmp_path / "a.yml", "conversations: [[u, v]]")
    before = load_examples(str(tmp_path))
    assert before.column("topic") == ["a", "b"]
    write(tmp_path / "b.yml", "conversations: [[x, z]]")
    assert load_examples(str(tmp_path)).sha256 != before.sha256


def test_data_set_directories(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).cast_column(
        "label", datasets.ClassLabel(names=["negative", "positive"])
    )
    table.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "several")
    for name, split, expected in (("single", "train", [1, 0]), ("several", "train", [1, 0]), ("several", "test", [0])):
        examples = load_examples(str(tmp_path / name), split=split)
        assert examples.column("label") == expected
        assert examples.class_names == {"label": ("negative", "positive")}


def test_directory_of_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    write(folder / "test.jsonl", '{"text": "c"}\n')
    assert load_examples(str(folder)).column("text") == ["a", "b"]
    assert load_examples(str(folder), split="test").column("text") == ["c"]
    assert "nosuch" in message_of(str(folder), split="nosuch")


def test_inside_a_package() -> None:
    assert load_examples("package:sfedlora/assets/tiny_chat.jsonl").column("prompt")
    assert "not installed" in message_of("package:no_such_package_here/data.jsonl")
    assert "nothing at" in message_of("package:sfedlora/assets/nosuch.jsonl")


def test_missing_column_lists_those_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'answer'; the columns are 'prompt', 'response'"):
        load_examples(as_jsonl(tmp_path)).column("answer")


def test_missing_key_is_none(tmp_path: Path) -> None:
    examples = load_examples(write(tmp_path / "x.jsonl", '{"a": 1}\n{"b": [2]}\n'))
    assert examples.column("a") == [1, None]
    assert examples.column("b") == [None, [2]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "file is empty"),
        ("blank.csv", b"\n \n", "file is empty"),
        ("header.csv", b"prompt,response\n", "holds no examples"),
        ("array.json", b"[]", "holds no examples"),
        ("cut.jsonl", b'{"a": 1}\n\n{"a": "tw', "line 3 is not valid JSON .*last line, so the file may be truncated"),
        ("middle.jsonl", b'{"a": 1}\n{a: 2}\n{"a": 3}\n', r"line 2 is not valid JSON \(Expecting property name[^;]*$"),
        ("list.jsonl", b'{"a": 1}\n[1]\n', "line 2 holds an array; expected one JSON object per line"),
        ("cut.json", b'[{"a": 1},\n {"a": ', "not valid JSON at line 2 .*may be truncated"),
        ("pretty.json", b'{\n "a": 1\n}', "line 1 is not valid JSON"),
        ("scalar.json", b"3", "holds a number; expected an array of objects"),
        ("mixed.json", b'[{"a": 1}, 2]', "item 1 of the array is a number"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("deep.jsonl", b'{"a":' * 100_000, "line 1 is not valid JSON"),
        ("latin.jsonl", '{"a": "x"}\n{"a": "é"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at offset 18, line 2"),
        ("utf16.csv", "a,b\n1,2\n".encode("utf-16"), "not UTF-8.*looks like UTF-16"),
        ("long.csv", b"a,b\n1,2\n1,2,3\n", r"line 3 has 3 fields; expected 2 as in the header \(a, b\)"),
        ("short.tsv", b"a\tb\n1\n", "line 2 has 1 fields; expected 2"),
        ("quote.csv", b'a,b\n"x"y,2\n', "line 2 is malformed"),
        ("open.csv", b'a,b\n1,"x\ny\n', "line 3 is malformed .*quotes"),
        ("twice.csv", b"a,a\n1,2\n", "names column 'a' twice"),
        ("noname.csv", b"a,\n1,2\n", "column without a name"),
        ("bad.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("rows.xlsx", b"PK", "unknown kind of file '.xlsx'; expected .jsonl"),
        ("bad.yml", b"conversations: [[a, b]\n- c", "line 2 is not valid YAML"),
        ("other.yml", b"a: 1", "expected a key 'conversations'"),
        ("deep.yml", b"conversations: " + b"[" * 5000, "not valid YAML"),
        ("control.yml", b"conversations:\n- - a\x00\n", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    source = write(tmp_path / name, content)
    message = message_of(source)
    assert message.startswith(source)
    assert re.search(expected, message)


def test_not_found(tmp_path: Path) -> None:
    for source in (str(tmp_path / "nosuch.jsonl"), "nosuch.csv", "a/b/c", str(tmp_path / "nosuch")):
        assert "file not found" in message_of(source)


def test_hub_that_cannot_be_reached() -> None:
    message = message_of("owner/name", subset="part")
    assert message.startswith("owner/name (subset 'part', split 'train'): no such file here, and not loadable")


def test_empty_directory_and_unusable_ones(tmp_path: Path) -> None:
    assert "an empty directory" in message_of(str(tmp_path))
    write(tmp_path / "state.json", "{}")
    assert "not a data set directory that can be read" in message_of(str(tmp_path))


def test_a_loading_script_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    marker = tmp_path / "ran"
    write(folder / "script.py", f"open({str(marker)!r}, 'w').close()")
    message_of(str(folder))
    assert not marker.exists()


def test_subset_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "a single file has no subsets" in message_of(as_jsonl(tmp_path), subset="mnli")


def test_very_long_csv_field_and_limit_restored(tmp_path: Path) -> None:
    previous = csv.field_size_limit(100_000)
    examples = load_examples(write(tmp_path / "long.csv", "a\n" + "x" * 300_000 + "\n"))
    assert len(examples.column("a")[0]) == 300_000
    assert csv.field_size_limit(previous) == 100_000


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert "empty directory" in message_of(str(tmp_path / "folder.jsonl"))
