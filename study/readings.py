"""What is read out of the study's lines: changes of the loss, gradient norms, slopes; means and spreads over seeds.

A line is one run (`study.run`). A run counts as diverged if a client had to be left out, no number came out, or its
test loss ended far above its start.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sfedlora.report.panels import fit_slope
from sfedlora.report.series import Line, line_of_points

__all__ = [
    "GRADIENT_ROUND",
    "Study",
    "at_round",
    "center",
    "comparable",
    "diverged",
    "line_over",
    "loss_change",
    "mean_change",
    "of_part",
    "on_arm",
    "place",
    "read_study",
    "rules_of",
    "slope",
]

Run = Mapping[str, Any]
Study = Sequence[Run]

GRADIENT_ROUND = 2
"""The first round in which every client starts from an averaged A and a trained B."""
FAR_ABOVE = 0.1
"""Nats above the start; nothing that learns ends there."""


def read_study(results: Path) -> list[dict[str, Any]]:
    """All lines of all parts."""
    files = sorted(results.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def comparable(study: Study) -> list[Run]:
    """The lines without seeds of which a study cut short has fewer runs than of the others: lines need like seeds."""
    counts = Counter(_part_and_seed(run) for run in study)
    most = {part: max(count for (other, _), count in counts.items() if other == part) for part, _ in counts}
    return [run for run in study if counts[_part_and_seed(run)] == most[run["part"]]]


def _part_and_seed(run: Run) -> tuple[str, int]:
    return run["part"], run["settings"]["seed"]


def of_part(study: Study, part: str, **settings: Any) -> list[Run]:
    """The lines of one part with these values (`rule`, `rate`)."""
    return [run for run in study if run["part"] == part and all(run[key] == value for key, value in settings.items())]


def place(run: Run) -> tuple[int, int]:
    """Rank and number of clients."""
    return run["settings"]["lora.rank"], run["settings"]["partition.num_clients"]


def center(runs: Sequence[Run]) -> tuple[int, int]:
    """Where the arms of the cross meet: the rank and the number of clients that most runs have."""
    ranks, clients = (Counter(place(run)[axis] for run in runs) for axis in (0, 1))
    return ranks.most_common(1)[0][0], clients.most_common(1)[0][0]


def on_arm(runs: Sequence[Run], axis: int) -> list[Run]:
    """The runs among which the rank (axis 0) or the number of clients (axis 1) varies."""
    return [run for run in runs if place(run)[1 - axis] == center(runs)[1 - axis]]


def loss_change(run: Run) -> float | None:
    """Test loss after the last round less that of the start, weighted mean over clients; None without a number."""
    return _change(run, "eval_loss")


def diverged(run: Run) -> bool:
    """Whether the run got out of hand."""
    change = loss_change(run)
    return change is None or change > FAR_ABOVE or any(record["excluded"] for record in run["rounds"])


def rules_of(runs: Iterable[Run]) -> list[str]:
    """The rules in the order in which they come."""
    return list(dict.fromkeys(run["rule"] for run in runs))


def mean_change(runs: Sequence[Run], key: str = "eval_loss") -> float | None:
    """Mean over seeds; None where one of them has no number or there is none."""
    changes = [_change(run, key) for run in runs]
    known = [change for change in changes if change is not None]
    return fmean(known) if known and len(known) == len(changes) else None


def line_over(runs: Sequence[Run], rule: str, axis: int, value: Callable[[Run], float | None], size: str = "") -> Line:
    """One rule's line against the rank (axis 0) or the number of clients (axis 1), seeds joined.

    Runs off the cross, and runs without a value, are left out.
    """
    own = [run for run in on_arm(runs, axis) if run["rule"] == rule]
    points = [[(float(place(run)[axis]), found)] for run in own if (found := value(run)) is not None]
    return line_of_points(rule, size, points)


def at_round(key: str, round_num: int = GRADIENT_ROUND) -> Callable[[Run], float | None]:
    """A reading of one key of one round; None where it is missing or not above zero."""

    def value(run: Run) -> float | None:
        found = next((record[key] for record in run["rounds"] if record["round_num"] == round_num), None)
        return found if found is not None and found > 0 else None

    return value


def slope(line: Line) -> float | None:
    """Least-squares slope of a line's means in log-log coordinates; None with fewer than two points."""
    points = [(x, mean) for x, mean, _, _ in line.points if mean > 0]
    return fit_slope(points) if len(points) > 1 else None


def _change(run: Run, key: str) -> float | None:
    if run["failed"] or "last" not in run:
        return None
    last, start = run["last"]["test"].get(key), run["initial"]["test"].get(key)
    if last is None or start is None or not math.isfinite(last):
        return None
    return float(last - start)
