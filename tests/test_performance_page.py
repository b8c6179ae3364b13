"""docs/performance.md: its figures are those of the published raw data, and what it says of missed bars is true."""

from __future__ import annotations

import json
import re

from support.scripts import ROOT, load_script

PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "assets" / "benchmarks.json").read_text(encoding="utf-8"))


def test_the_table_is_what_the_script_writes() -> None:
    script = load_script("write_benchmarks_table")
    assert script.performance_page(PAGE, RESULTS) == PAGE, "run python scripts/write_benchmarks_table.py"


def test_bold_figures_are_those_that_miss_their_bar() -> None:
    rows = re.findall(r"^\| (.*?) \| at (most|least) ([\d.]+) \| (\**)([\d.e+-]+)\**", PAGE, flags=re.MULTILINE)
    assert len(rows) > 30
    for what, kind, bar, bold, value in rows:
        holds = float(value) <= float(bar) if kind == "most" else float(value) >= float(bar)
        assert holds != bool(bold), what


def test_every_benchmark_that_has_a_bar_was_run() -> None:
    commands = {figure["command"].split()[0] for figure in RESULTS["figures"]}
    folder = ROOT / "benchmarks"
    own_report = {"all.py", "deployment.py"}  # docs/deployment.md has the figures of the second one
    assert commands == {path.name for path in folder.glob("*.py")} - own_report
