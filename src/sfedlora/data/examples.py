"""Examples: the rows of a data source, numbered from 0 in file order.

Here: which kind of source a string names, Hugging Face data sets and data set directories, the digest of a source.
Not here: parsing of single files (`files`), shipped corpora (`corpora`), token ids (`encode`). `datasets` is imported
when a source needs it: it takes 100 MB, and a server across sites reads no examples.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfedlora.data.corpora import chatterbot_rows
from sfedlora.data.files import FILE_SUFFIXES, read_file
from sfedlora.errors import DataError, InputError
from sfedlora.sources import local_path

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Examples", "load_examples"]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
YAML_SUFFIXES = (".yml", ".yaml")


@dataclass(frozen=True)
class Examples:
    """The rows of a data source as columns of equal length.

    Attributes:
        columns: column name -> values in row order; a missing value is None.
        source: the string the rows were loaded from.
        sha256: digest of the file, of the files of a directory, or of the rows of a hub data set.
        class_names: column -> names of its class ids, where the source declares them (Hugging Face `ClassLabel`).
    """

    columns: Mapping[str, Sequence[Any]]
    source: str
    sha256: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> list[Any]:
        """All values of one column, in row order.

        Raises:
            DataError: there is no such column; the message lists those that exist.
        """
        if name not in self.columns:
            there = ", ".join(repr(column) for column in self.columns)
            raise DataError(f"{self.source}: no column {name!r}; the columns are {there}")
        return list(self.columns[name])


def load_examples(source: str, *, subset: str | None = None, split: str = "train") -> Examples:
    """Load all rows of a data source.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file; a chatterbot .yml file or a directory of them; a directory
            that `datasets` can load; `package:NAME/path` for any of these; or a hub id.
        subset: configuration name of a data set (`mnli` of `glue`); only for directories and hub ids.
        split: the split to read; only for directories and hub ids.

    Raises:
        DataError: the source does not exist, cannot be read as what it claims to be, or holds no rows.
    """
    path = _find(source)
    if path is None:
        examples = _load_from_hub(source, subset, split)
    elif path.is_dir():
        examples = _load_directory(path, source, subset, split)
    elif subset is not None:
        raise DataError(f"{source}: subset {subset!r} was given, but a single file has no subsets; leave it out")
    elif path.suffix.lower() in YAML_SUFFIXES:
        examples = Examples(_columns_of(chatterbot_rows(path)), source, _digest_files([path], path.parent))
    else:
        examples = Examples(*_file_parts(path, source))
    if len(examples) == 0:
        raise DataError(f"{source}: holds no examples; expected at least one row")
    return examples


def _find(source: str) -> Path | None:
    """The local path of a source, or None for a hub id."""
    try:
        path = local_path(source)
    except InputError as error:
        raise DataError(str(error)) from error
    if path is None and (Path(source).suffix.lower() in FILE_SUFFIXES + YAML_SUFFIXES or not HUB_ID.fullmatch(source)):
        raise DataError(f"{source}: file not found; expected an existing file or directory, or a hub id (owner/name)")
    return path


def _file_parts(path: Path, source: str) -> tuple[Mapping[str, Sequence[Any]], str, str, Mapping[str, tuple[str, ...]]]:
    if path.suffix.lower() == ".parquet":
        columns, names = _dataset_parts(_read_parquet(path, source))
        return columns, source, _digest_files([path], path.parent), names
    return read_file(path), source, _digest_files([path], path.parent), MappingProxyType({})


def _read_parquet(path: Path, source: str) -> Dataset:
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
        table.validate(full=True)  # texts that are not UTF-8, offsets that point outside
        return datasets.Dataset(datasets.table.InMemoryTable(table))
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{source}: not a readable Parquet file: {_first_line(error)}") from error


def _load_directory(path: Path, source: str, subset: str | None, split: str) -> Examples:
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and not _is_hidden(entry.relative_to(path)))
    digest = _digest_files(files, path)
    suffixes = {entry.suffix.lower() for entry in files}
    if not suffixes.isdisjoint(YAML_SUFFIXES) and suffixes.isdisjoint((*FILE_SUFFIXES, ".arrow")):
        return Examples(_columns_of(chatterbot_rows(path)), source, digest)
    if not files:
        raise DataError(f"{source}: an empty directory; expected data files in it")
    import datasets

    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(str(path), subset, split=split)
    except Exception as error:  # every builder of `datasets` raises its own kinds
        raise DataError(f"{source}: not a data set directory that can be read: {_first_line(error)}") from error
    columns, names = _dataset_parts(loaded)
    return Examples(columns, source, digest, names)


def _load_from_hub(source: str, subset: str | None, split: str) -> Examples:
    import datasets

    try:
        loaded = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # network, access, builder and split errors have no common base
        where = f"{source} (subset {subset!r}, split {split!r})"
        raise DataError(f"{where}: no such file here, and not loadable from the hub: {_first_line(error)}") from error
    columns, names = _dataset_parts(loaded)
    return Examples(columns, source, _digest_rows(columns), names)


def _dataset_parts(loaded: Dataset) -> tuple[dict[str, Sequence[Any]], dict[str, tuple[str, ...]]]:
    from datasets.features import ClassLabel

    columns: dict[str, Sequence[Any]] = {name: loaded[name] for name in loaded.column_names}
    names = {key: tuple(value.names) for key, value in loaded.features.items() if isinstance(value, ClassLabel)}
    return columns, names


def _columns_of(rows: Sequence[Mapping[str, str]]) -> dict[str, Sequence[Any]]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith((".", "__")) for part in relative.parts)


def _digest_files(files: Iterable[Path], root: Path) -> str:
    """Sha256 of one file's bytes; of several, sha256 over `name, digest` lines in name order."""
    digests: list[tuple[str, str]] = []
    for file in files:
        with file.open("rb") as stream:
            digests.append((file.relative_to(root).as_posix(), hashlib.file_digest(stream, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in digests).encode()).hexdigest()


def _digest_rows(columns: Mapping[str, Sequence[Any]]) -> str:
    """Sha256 over names and values: the same rows give the same digest whatever cache they came from."""
    digest = hashlib.sha256()
    for name, values in columns.items():
        digest.update(json.dumps(name).encode())
        for value in values:
            digest.update(json.dumps(value, default=str, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
