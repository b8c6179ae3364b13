"""How one client's rows are split into train, validation and test.

The split depends on the client's own rows, its id and the seed only: other clients and their number do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfedlora.errors import ConfigError, DataError
from sfedlora.seeds import numpy_generator

__all__ = ["SMALLEST_CLIENT", "ClientSplit", "group_rows", "split_client"]

Rows = NDArray[np.int64]

SMALLEST_CLIENT = 3  # one example for each split


@dataclass(frozen=True)
class ClientSplit:
    """One client's rows, ascending positions into the encoded data (which are source rows)."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def split_client(
    rows: Sequence[int] | Rows,
    *,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    client_id: str,
    seed: int,
    groups: Sequence[Any] | None = None,
) -> ClientSplit:
    """Split one client's rows at random into train, validation and test, at least one row in each.

    Args:
        rows: the client's rows, in any order.
        fractions: of train, validation and test; validation and test are rounded to whole rows.
        client_id: enters the seed of the draw and messages.
        seed: of the run.
        groups: one value per row of the whole source (indexed by row); rows of one value stay in one split.

    Raises:
        DataError: fewer than 3 rows, or fewer than 3 groups.
        ConfigError: fractions that are not positive or do not add up to 1.
    """
    if not (all(fraction > 0 for fraction in fractions) and abs(sum(fractions) - 1) < 1e-6):
        raise ConfigError(f"split fractions {list(fractions)}: expected three positive numbers that add up to 1")
    ordered = np.sort(np.asarray(rows, dtype=np.int64))
    units = [ordered[[i]] for i in range(len(ordered))] if groups is None else group_rows(ordered, groups)
    if len(units) < SMALLEST_CLIENT:
        what = "examples" if groups is None else "groups of examples"
        raise DataError(
            f"client {client_id!r} has {len(units)} {what}; expected at least {SMALLEST_CLIENT}, "
            "one for each of train, validation and test"
        )
    num_validation, num_test = (max(1, int(len(ordered) * fraction + 0.5)) for fraction in fractions[1:])
    targets = np.array([len(ordered) - num_validation - num_test, num_validation, num_test])
    order = numpy_generator(seed, "split", client_id).permutation(len(units))
    parts = _fill(targets, [units[i] for i in order])
    train, validation, test = (tuple(sorted(int(row) for unit in part for row in unit)) for part in parts)
    return ClientSplit(train, validation, test)


def group_rows(rows: Rows, groups: Sequence[Any]) -> list[Rows]:
    """Rows of equal group value together, groups in the order of their first row.

    Args:
        rows: ascending rows.
        groups: one value per row of the whole source (indexed by row).

    Raises:
        DataError: a row whose group is missing or neither text nor an integer.
    """
    members: dict[int | str, list[int]] = {}
    for row in rows.tolist():
        group = groups[row]
        if not isinstance(group, int | str):
            what = "missing" if group is None else f"{group!r}, not text or an integer"
            raise DataError(f"the group of row {row} is {what}; fill the group column or do without groups")
        members.setdefault(group, []).append(row)
    return [np.array(group, dtype=np.int64) for group in members.values()]


def _fill(targets: NDArray[np.int64], units: Sequence[Rows]) -> list[list[Rows]]:
    """Give each unit to the part that lacks most rows; the last units go to parts that are still empty."""
    missing = targets.copy()
    parts: list[list[Rows]] = [[] for _ in targets]
    for left, unit in zip(range(len(units), 0, -1), units, strict=True):
        empty = [i for i, part in enumerate(parts) if not part]
        among = empty if len(empty) >= left else range(len(parts))
        chosen = max(among, key=lambda i: missing[i])
        parts[chosen].append(unit)
        missing[chosen] -= len(unit)
    return parts
