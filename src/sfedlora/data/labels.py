"""Class labels to class ids.

Labels are integers or strings. Strings that all read as integers (a CSV file has only strings) count as integers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfedlora.errors import DataError

__all__ = ["number_labels"]

INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")


def number_labels(
    values: Sequence[Any], labels: Sequence[str | int] | None, *, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number the labels of a column.

    Args:
        values: one label per row.
        labels: label values in the order of their ids. None: the sorted distinct values. Integer values stand for the
            ids themselves where no label reads as an integer (`labels: [negative, positive]` over 0 and 1).
        where: source and column, for messages.

    Returns:
        (n,) class ids, and the names of the ids.

    Raises:
        DataError: a value that is no integer or string, a mix of both, a value outside `labels`, or a single class.
    """
    plain = _unified(values, where)
    if labels is None:
        known = sorted(set(plain), key=lambda value: (value, "") if isinstance(value, int) else (0, value))
        names = tuple(str(value) for value in known)
        ids = {value: index for index, value in enumerate(known)}
    else:
        names = tuple(str(value) for value in labels)
        if len(set(names)) != len(names):
            raise DataError(f"{where}: the list of labels names a label twice: {list(names)}")
        ids = _ids_by_name(plain, names)
    if len(names) < 2:
        raise DataError(f"{where}: a single label {', '.join(names)}; classification needs at least two")
    for row, value in enumerate(plain):
        if value not in ids:
            raise DataError(f"{where}: label {value!r} in row {row} is not one of {list(names)}")
    return np.array([ids[value] for value in plain], dtype=np.int64), names


def _unified(values: Sequence[Any], where: str) -> list[str | int]:
    """The labels as all strings or all integers."""
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str):
            kind = "a missing value" if value is None else f"{value!r} ({type(value).__name__})"
            raise DataError(f"{where}: label {kind} in row {row}; expected an integer or a string")
        if isinstance(value, str) is not isinstance(values[0], str):
            raise DataError(f"{where}: label {value!r} in row {row} mixes strings and integers; use one of them")
    if all(isinstance(value, int) or INTEGER.fullmatch(value) for value in values):
        return [int(value) for value in values]
    return list(values)


def _ids_by_name(plain: Sequence[str | int], names: Sequence[str]) -> dict[str | int, int]:
    """Label value -> id: by name, or integers as they are where the names hold none."""
    if plain and isinstance(plain[0], int) and not any(INTEGER.fullmatch(name) for name in names):
        return {index: index for index in range(len(names))}
    by_name = {name: index for index, name in enumerate(names)}
    return {value: by_name[str(value)] for value in set(plain) if str(value) in by_name}
