"""Write the table of docs/performance.md from docs/assets/benchmarks.json: each figure beside its bar.

    make bench BENCH=--whole
    cp benchmarks/results/benchmarks.* docs/assets/
    python scripts/write_benchmarks_table.py

The table has the figures that have a bar, in the order in which they were measured. A test tells when the page is out
of date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["performance_page"]

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
RESULTS = DOCS / "assets" / "benchmarks.json"
BEGIN = "<!-- Begin of the table that scripts/write_benchmarks_table.py writes. -->"
END = "<!-- End of the table. -->"
HEADER = "| what | bar | measured | command |\n|---|---|---|---|\n"


def performance_page(page: str, results: dict[str, Any]) -> str:
    """The page with its table renewed from the content of benchmarks.json."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "".join(_row(figure) for figure in results["figures"] if figure["bar"] is not None)
    return f"{before}{BEGIN}\n{HEADER}{rows}{END}{after}"


def _row(figure: dict[str, Any]) -> str:
    value = f"{figure['value']:.3g}" if figure["holds"] else f"**{figure['value']:.3g}**"
    return f"| {figure['what']} | {figure['kind']} {figure['bar']:g} | {value} | `{figure['command']}` |\n"


def main() -> None:
    """Renew the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(performance_page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
