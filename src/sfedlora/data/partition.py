"""How rows are dealt to clients.

Schemes:
    iid        random shares whose sizes differ by at most one row.
    dirichlet  for each label, its rows are divided by proportions over the clients drawn from
               Dirichlet(concentration, .., concentration); sizes differ too. Smaller is more uneven.
    column     one client per value of a column.
    shards     rows sorted by label and cut into two shards per client; a client gets two random shards.
    quantity   random shares with sizes drawn from Dirichlet(concentration); labels mix as in iid.

`dirichlet` is the definition of Yurochkin et al. and of flwr-datasets' `DirichletPartitioner` with
`self_balancing=False`; Hsu et al. use the same concentration the other way round (label proportions drawn per client,
equal sizes). `shards` is McMahan et al.'s and `ShardPartitioner(num_shards_per_node=2)`'s; `quantity` is the size skew
of Li et al.; `iid` and `column` are `IidPartitioner` and `NaturalIdPartitioner`. The draws themselves differ.

With `groups`, the unit that is dealt is a group of rows (a conversation, a document), never cut; its label is the most
frequent one of its rows, sizes are met as closely as groups allow, and a client has at least 3 groups. Under `column`
the column alone decides the client: a conversation of two speakers is then a group of each.

Each client's train, validation and test rows are drawn in `splits`; its directory name is made in `directories`.

References:
    McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019.
    Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019.
    Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, ICDE 2022.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfedlora.data.directories import safe_directory_name
from sfedlora.data.splits import SMALLEST_CLIENT, ClientSplit, group_rows, split_client
from sfedlora.errors import ConfigError, DataError
from sfedlora.seeds import numpy_generator

__all__ = ["ClientSplit", "Scheme", "assign_clients", "safe_directory_name", "split_client"]

Rows = NDArray[np.int64]
Scheme = Literal["iid", "dirichlet", "column", "shards", "quantity"]

MAX_DRAWS = 100
NAMES_SHOWN = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Units:
    """What is dealt whole: single rows, or groups of rows.

    Attributes:
        rows: the rows of each unit; units in the order of their first row.
        sizes: (units,) rows of each unit.
        labels: (units,) label number of each unit, or None.
        requirement: what messages add about groups.
    """

    rows: Sequence[Rows]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    requirement: str


def assign_clients(
    *,
    scheme: Scheme,
    num_rows: int,
    num_clients: int | None,
    labels_or_column: Sequence[Any] | None = None,
    concentration: float | None = None,
    min_examples: int = 10,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> dict[str, Rows]:
    """Deal rows to clients.

    Random schemes draw anew, with derived seeds, up to 100 times while a client has fewer than `min_examples` rows.

    Args:
        scheme: see the module.
        num_rows: rows are 0 .. num_rows - 1.
        num_clients: N. For `column`: keep that many largest values; None keeps all.
        labels_or_column: one integer or string per row: labels for `dirichlet` and `shards`, the values of `column`.
        concentration: of the Dirichlet distribution of `dirichlet` and `quantity`; not used by the other schemes.
        min_examples: fewest rows of a client; 3 where less is given. `column` leaves out values with fewer and
            logs their names.
        seed: of the run.
        groups: one value per row; rows of one value stay on one client (not for `column`, see the module).

    Returns:
        Client id -> ascending rows. Ids are "0" .. "N-1", or the column's values as strings, in ascending order.

    Raises:
        DataError: fewer rows than N clients need, fewer than two clients, a missing or unusable label or column value,
            or a client still too small after 100 draws.
        ConfigError: an unknown scheme, a number out of range, or no `num_clients`.
    """
    if scheme not in ("iid", "dirichlet", "column", "shards", "quantity"):
        raise ConfigError(f"unknown partition scheme {scheme!r}; expected iid, dirichlet, column, shards or quantity")
    if groups is not None and len(groups) != num_rows:
        raise DataError(f"{len(groups)} groups for {num_rows} rows; expected one group per row")
    least = max(min_examples, SMALLEST_CLIENT)
    if scheme == "column":
        return _by_column(_label_values(labels_or_column, num_rows, scheme), num_clients, least, groups)
    if num_clients is None or num_clients < 1:
        raise ConfigError(f"partition scheme {scheme!r} needs num_clients of at least 1, got {num_clients}")
    if scheme in ("dirichlet", "quantity") and (concentration is None or not 0 < concentration < math.inf):
        raise ConfigError(f"concentration is {concentration}; scheme {scheme!r} needs a finite number above 0")
    if num_rows < num_clients * least:
        raise DataError(
            f"{num_rows} examples are too few for {num_clients} clients with at least {least} each "
            f"(needs {num_clients * least}); use fewer clients, a smaller min_examples or more data"
        )
    values = _label_values(labels_or_column, num_rows, scheme) if scheme in ("dirichlet", "shards") else None
    units = _units(num_rows, values, groups)
    owners = _draw_large_enough(scheme, units, num_clients, concentration or 0.0, least=least, seed=seed)
    order = np.argsort(owners, kind="stable")
    shares = np.split(order, np.searchsorted(owners[order], np.arange(1, num_clients)))
    return {str(i): np.sort(np.concatenate([units.rows[unit] for unit in share])) for i, share in enumerate(shares)}


def _label_values(values: Sequence[Any] | None, num_rows: int, scheme: str) -> list[str | int]:
    if values is None:
        raise DataError(f"partition scheme {scheme!r} needs class labels or a column to deal by (partition.column)")
    if len(values) != num_rows:
        raise DataError(f"partition scheme {scheme!r}: {len(values)} labels for {num_rows} rows")
    plain: list[str | int] = []
    for row, value in enumerate(values):
        if isinstance(value, np.integer):
            plain.append(int(value))
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(
                f"partition scheme {scheme!r}: the value in row {row} holds invalid Unicode: {value!a}; repair it"
            )
        elif isinstance(value, int | str) and not isinstance(value, bool):
            plain.append(value)
        else:
            raise DataError(
                f"partition scheme {scheme!r}: the value in row {row} is {value!r}; expected text or integer"
            )
    return plain


def _by_column(
    values: Sequence[str | int], num_clients: int | None, least: int, groups: Sequence[Any] | None
) -> dict[str, Rows]:
    if num_clients is not None and num_clients < 2:
        raise ConfigError(f"num_clients is {num_clients}; expected at least 2 clients")
    rows_of: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows_of.setdefault(str(value), []).append(row)
    num_units = {
        name: len(rows) if groups is None else len(group_rows(np.array(rows, dtype=np.int64), groups))
        for name, rows in rows_of.items()
    }
    kept = [name for name in rows_of if len(rows_of[name]) >= least and num_units[name] >= SMALLEST_CLIENT]
    if len(kept) < max(2, num_clients or 0):
        raise DataError(
            f"only {len(kept)} of {len(rows_of)} column values have at least {least} examples"
            f"{'' if groups is None else ' in at least 3 groups'}; expected {num_clients or 'at least 2'} clients: "
            "lower min_examples or num_clients, or use another column"
        )
    _note_left_out({name: len(rows_of[name]) for name in rows_of.keys() - set(kept)}, least)
    largest = sorted(kept, key=lambda name: (-len(rows_of[name]), name))[:num_clients]
    numeric = all(isinstance(value, int) for value in values)
    ordered = sorted(largest, key=int) if numeric else sorted(largest)
    return {name: np.array(rows_of[name], dtype=np.int64) for name in ordered}


def _note_left_out(sizes: Mapping[str, int], least: int) -> None:
    if not sizes:
        return
    named = [f"{name} ({sizes[name]})" for name in sorted(sizes, key=lambda name: (-sizes[name], name))]
    more = f" and {len(named) - NAMES_SHOWN} more" if len(named) > NAMES_SHOWN else ""
    shown = ", ".join(named[:NAMES_SHOWN])
    logger.warning("left out %d column values (fewer than %d examples): %s%s", len(named), least, shown, more)
    logger.info("all column values left out: %s", ", ".join(named))


def _units(num_rows: int, values: Sequence[str | int] | None, groups: Sequence[Any] | None) -> Units:
    rows = np.arange(num_rows, dtype=np.int64)
    units = list(rows[:, None]) if groups is None else group_rows(rows, groups)
    labels: NDArray[np.int64] | None = None
    if values is not None:
        number = {value: i for i, value in enumerate(sorted(set(values), key=lambda value: (str(type(value)), value)))}
        numbers = [number[value] for value in values]
        if groups is not None:
            numbers = [_most_common([numbers[row] for row in unit]) for unit in units]
        labels = np.array(numbers, dtype=np.int64)
    requirement = "" if groups is None else f" in at least {SMALLEST_CLIENT} groups"
    return Units(units, np.array([len(unit) for unit in units], dtype=np.int64), labels, requirement)


def _most_common(numbers: Sequence[int]) -> int:
    counts = Counter(numbers)
    return min(counts, key=lambda number: (-counts[number], number))


def _draw_large_enough(
    scheme: Scheme, units: Units, num_clients: int, concentration: float, *, least: int, seed: int
) -> NDArray[np.int64]:
    """(units,) client numbers of the first draw in which every client has `least` rows and a unit for each split."""
    best = 0
    for attempt in range(MAX_DRAWS):
        rng = numpy_generator(seed, "partition", scheme, attempt)
        owners = _draw_owners(scheme, units, num_clients, concentration, rng)
        fewest_rows = int(np.bincount(owners, weights=units.sizes, minlength=num_clients).min())
        fewest_units = int(np.bincount(owners, minlength=num_clients).min())
        if fewest_rows >= least and fewest_units >= SMALLEST_CLIENT:
            return owners
        best = max(best, fewest_rows)
    raise DataError(
        f"partition scheme {scheme!r}: in {MAX_DRAWS} draws over {num_clients} clients the smallest had {best} "
        f"examples at best; expected {least}{units.requirement}: use fewer clients, a larger concentration or a "
        "smaller min_examples"
    )


def _draw_owners(
    scheme: Scheme, units: Units, num_clients: int, concentration: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(units,) the client number of each unit."""
    shuffled = rng.permutation(len(units.sizes))
    owners = np.empty(len(shuffled), dtype=np.int64)
    if scheme == "quantity":
        shares = rng.dirichlet(np.full(num_clients, concentration))
        owners[shuffled] = _cut(units.sizes[shuffled], shares)
    elif scheme == "iid" or units.labels is None:
        owners[shuffled] = _cut(units.sizes[shuffled], np.full(num_clients, 1 / num_clients))
    elif scheme == "shards":
        by_label = shuffled[np.argsort(units.labels[shuffled], kind="stable")]
        client_of_shard = rng.permutation(np.repeat(np.arange(num_clients), 2))
        owners[by_label] = client_of_shard[_cut(units.sizes[by_label], np.full(2 * num_clients, 0.5 / num_clients))]
    else:
        for label in range(int(units.labels.max()) + 1):
            members = shuffled[units.labels[shuffled] == label]
            shares = rng.dirichlet(np.full(num_clients, concentration))
            owners[members] = _cut(units.sizes[members], shares)
    return owners


def _cut(sizes: NDArray[np.int64], shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which consecutive share each unit falls into, by the middle of the rows it covers."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.cumsum(shares)[:-1] * total
    return np.searchsorted(bounds, ends - sizes / 2, side="right")
