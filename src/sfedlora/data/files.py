"""Text files to columns: JSON Lines, JSON arrays, CSV and TSV, with errors that name the line.

Not here: Parquet, directories and hub data sets (`examples`), chatterbot YAML (`corpora`).
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfedlora.errors import DataError

__all__ = ["FILE_SUFFIXES", "read_file", "read_text"]

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_file(path: Path) -> Mapping[str, Sequence[Any]]:
    """Columns of a .jsonl, .json, .csv or .tsv file; a key that a row lacks is None there.

    Raises:
        DataError: unknown suffix, unreadable, not UTF-8, malformed (with the line).
    """
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES or suffix == ".parquet":
        raise DataError(f"{path}: unknown kind of file {suffix!r}; expected {', '.join(FILE_SUFFIXES)}, .yml")
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected at least one row")
    if suffix == ".csv":
        return _parse_delimited(text, path, ",")
    if suffix == ".tsv":
        return _parse_delimited(text, path, "\t")
    if suffix == ".json" and not text.lstrip().startswith("{"):
        return _columns_of(_parse_json_array(text, path))
    return _columns_of(_parse_json_lines(text, path))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: unreadable, or not UTF-8 (with byte offset and line).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = "it looks like UTF-16; " if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise DataError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}, line {line}; "
            f"{hint}save the file as UTF-8"
        ) from error


def _parse_json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lines = text.rstrip().split("\n")  # not splitlines(): U+2028 and its like are legal inside JSON strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            last = "; it is the last line, so the file may be truncated" if number == len(lines) else ""
            raise DataError(f"{path}: line {number} is not valid JSON ({what}){last}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} holds {_kind(row)}; expected one JSON object per line")
        rows.append(row)
    return rows


def _parse_json_array(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        last = "; the file may be truncated" if error.pos >= len(text.rstrip()) else ""
        raise DataError(f"{path}: not valid JSON at line {error.lineno} ({error.msg}){last}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {_kind(rows)}; expected an array of objects, or one object per line")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {number} of the array is {_kind(row)}; expected an object")
    return rows


def _parse_delimited(text: str, path: Path, delimiter: str) -> dict[str, Sequence[Any]]:
    """CSV or TSV with a header line and the usual double quotes; every value stays a string."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(row for row in reader if row)
        _check_header(header, path)
        rows: list[list[str]] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row)} fields; "
                    f"expected {len(header)} as in the header ({', '.join(header)})"
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is malformed ({error}); check its quotes") from error
    finally:
        csv.field_size_limit(limit)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _check_header(header: Sequence[str], path: Path) -> None:
    for name in header:
        if not name.strip():
            raise DataError(f"{path}: the header (line 1) has a column without a name: {', '.join(header)}")
        if header.count(name) > 1:
            raise DataError(f"{path}: the header (line 1) names column {name!r} twice")


def _columns_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _kind(value: object) -> str:
    """What a JSON value is called, with its article."""
    kinds = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")
