"""Checksums of the files of a folder that appears whole, and the version of the format.

    checksums.sha256    a line per file, `<sha256 of its bytes>  <name>`, as `sha256sum --check` reads it

Version 1 had no checksums and no `format_version`; what says that it is of version 2 must have both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sfedlora.errors import InputError, StorageError
from sfedlora.storage import add_file

__all__ = ["CHECKSUMS", "FORMAT_VERSION", "add_checksummed_files", "format_of", "require_checksums"]

FORMAT_VERSION = 2
CHECKSUMS = "checksums.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def format_of(record: Mapping[str, Any], path: Path) -> int:
    """The version of the format that a file says it is of; without a word, 1.

    Raises:
        StorageError: it is no version.
        InputError: it is newer than this sfedlora.
    """
    version = record.get("format_version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise StorageError(f"{path}: damaged or edited: format_version is {version!r}; put the original file back")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: written in format {version} by a newer sfedlora; this one reads up to format {FORMAT_VERSION}: "
            "install a newer sfedlora"
        )
    return version


def add_checksummed_files(folder: Path, content: Mapping[str, bytes], *, private: bool = False) -> None:
    """Write files into the folder of a `directory_written_whole`, and their checksums.

    Raises:
        OSError: as `add_file`.
    """
    for name, raw in content.items():
        add_file(folder / name, raw, private=private)
    lines = [f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in content.items()]
    add_file(folder / CHECKSUMS, "".join(lines).encode(), private=private)


def require_checksums(folder: Path, record: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare files with their checksums, if the format of the record has any.

    Args:
        folder: where the files and checksums.sha256 are.
        record: content of the file that says the format.
        names: the files.

    Raises:
        StorageError: a file is missing, or is not what was written.
        InputError: the format is newer than this sfedlora.
    """
    if format_of(record, folder) == 1 and not (folder / CHECKSUMS).exists():
        return
    sums = _read_checksums(folder / CHECKSUMS)
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}); put the original file back") from None
        if sums.get(name) != found:
            raise StorageError(f"{path}: damaged: its content is not what was written; put the original file back")


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); put the original file back") from None
    except UnicodeDecodeError:
        lines = [""]
    matched = [_LINE.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matched if match is not None}
    if None in matched:
        raise StorageError(f"{path}: damaged: not a list of checksums; put the original file back")
    return sums
