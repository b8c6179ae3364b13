from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sfedlora.data.labels import number_labels
from sfedlora.errors import DataError


@pytest.mark.parametrize(
    ("values", "labels", "ids", "names"),
    [
        (["pos", "neg", "pos"], None, [1, 0, 1], ("neg", "pos")),
        ([2, 0, 1], None, [2, 0, 1], ("0", "1", "2")),
        ([10, 9, -1], None, [2, 1, 0], ("-1", "9", "10")),
        (["10", "9"], None, [1, 0], ("9", "10")),  # a CSV file has only strings
        (["01", "1"], None, [0, 1], ("01", "1")),  # no integer is written 01
        (["pos", "neg"], ["pos", "neg"], [0, 1], ("pos", "neg")),
        ([0, 1, 1], ["negative", "positive"], [0, 1, 1], ("negative", "positive")),
        ([5, 3], [5, 4, 3], [0, 2], ("5", "4", "3")),
        (["5", "3"], ["5", "4", "3"], [0, 2], ("5", "4", "3")),
        ([1, 0], [1, 0], [0, 1], ("1", "0")),  # by name, not as ids
        (["x"], ["x", "y"], [0], ("x", "y")),
    ],
)
def test_numbering(
    values: list[Any], labels: Sequence[str | int] | None, ids: list[int], names: tuple[str, ...]
) -> None:
    numbered, found = number_labels(values, labels, where="file, column 'label'")
    assert numbered.tolist() == ids
    assert numbered.dtype == np.int64
    assert found == names


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (["a", None, "b"], None, "label a missing value in row 1; expected an integer or a string"),
        ([0, True], None, r"label True \(bool\) in row 1"),
        ([0, 1.0], None, r"label 1.0 \(float\) in row 1"),
        ([float("nan"), 1], None, r"label nan \(float\) in row 0"),
        ([0, [1]], None, r"label \[1\] \(list\) in row 1"),
        (["a", 1], None, "label 1 in row 1 mixes strings and integers"),
        (["a", "a"], None, "a single label a; classification needs at least two"),
        (["a", "b", "c"], ["a", "b"], r"label 'c' in row 2 is not one of \['a', 'b'\]"),
        ([0, 2], ["no", "yes"], "label 2 in row 1 is not one of"),
        ([0, -1], ["no", "yes"], "label -1 in row 1 is not one of"),
        ([0, 3], [0, 1], "label 3 in row 1 is not one of"),
        ([0, 1], ["a", "b", "a"], "names a label twice"),
        ([0, 1], ["a"], "a single label a"),
    ],
)
def test_unusable_labels(values: list[Any], labels: Sequence[str | int] | None, message: str) -> None:
    with pytest.raises(DataError, match=r"^file, column 'label': .*" + message):
        number_labels(values, labels, where="file, column 'label'")
