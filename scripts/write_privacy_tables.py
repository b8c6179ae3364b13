"""Write the tables of docs/privacy.md: what goes with what, asked of the rules that the configuration is checked by.

    python scripts/write_privacy_tables.py

A test tells when the page is out of date.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfedlora.federation.combinations import Protection, why_refused
from sfedlora.methods import METHODS, make_method

__all__ = ["OPTIONS", "SETTINGS", "is_allowed", "privacy_page"]

PAGE = Path(__file__).parents[1] / "docs" / "privacy.md"
BEGIN, END = "<!-- Begin of the tables that scripts/write_privacy_tables.py writes. -->", "<!-- End of the tables. -->"
OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "`robust: median`": {"robust": "median"},
        "`robust: trimmed_mean`": {"robust": "trimmed_mean", "attackers": 2},
        "`robust: krum`": {"robust": "krum", "attackers": 2},
        "`privacy.mode: central`": {"privacy": "central"},
        "`privacy.mode: local`": {"privacy": "local"},
        "secure sum": {"secure_sum": True},
    }
)
SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "`rounds.weighting: examples`": {"weighting": "examples"},
        "several ranks (`lora.rank: [4, 8]`)": {"several_ranks": True},
        "`lora.init: local`": {"init": "local"},
    }
)
EXAMPLE = "fedsa"


def is_allowed(method: str, *choices: Mapping[str, Any]) -> bool:
    """Whether some options and settings go with a method, and with one another."""
    merged: dict[str, Any] = {}
    for choice in choices:
        if any(merged.get(key, value) != value for key, value in choice.items()):
            return False  # two values of one key
        merged |= choice
    return why_refused(Protection(make_method(method), **merged)) is None


def privacy_page(page: str) -> str:
    """The page with its tables renewed."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    methods = {f"`{name}`": (name,) for name in METHODS}
    by_method = _table("`method.name`", methods, lambda row, option: is_allowed(row[0], option))
    pairs = _table("together with", OPTIONS, lambda row, option: is_allowed(EXAMPLE, row, option))
    by_setting = _table("setting", SETTINGS, lambda row, option: is_allowed(EXAMPLE, row, option))
    return f"{before}{BEGIN}\n{by_method}\n{pairs}\n{by_setting}{END}{after}"


def _table(corner: str, rows: Mapping[str, Any], allowed: Any) -> str:
    lines = [f"| {corner} | {' | '.join(OPTIONS)} |", "|---" * (len(OPTIONS) + 1) + "|"]
    for name, row in rows.items():
        cells = ("yes" if allowed(row, option) else "no" for option in OPTIONS.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(privacy_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
