"""The HTML report, parsed: what it says, that it loads nothing, and that text from files stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from sfedlora.errors import InputError, StorageError
from sfedlora.report import write_reports
from support.comparison_files import write_comparison
from support.html_pages import ReadPage, read_page
from support.run_files import add_clients, write_run

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 1">',
    "</script><script>window.pwned = 1</script>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "%{x}<br>&lt;b&gt;",
    "\u2028\x00\x1b[31m",
]


def report_of(directory: Path) -> ReadPage:
    (path,) = write_reports([directory])
    assert path == directory / "report.html"
    return read_page(path.read_text(encoding="utf-8"))


def table_with(page: ReadPage, heading: str) -> list[dict[str, str]]:
    tables = [table for table in page.tables if heading in table[0]]
    assert len(tables) == 1
    head, *rows = tables[0]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_run_is_told_in_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=3.5)
    add_clients(run, {"anna": (3.4, 2.25), "bert": (3.6, 3.75)}, {"carl": "loss is not finite"})
    page = report_of(run)
    text = " ".join(page.texts)
    assert "finished: 2 rounds" in text
    assert "1 of 2 clients have a lower or equal validation loss than with the initial model, 1 a higher one." in text
    anna, bert = table_with(page, "loss change")
    assert anna["client"] == "anna"
    assert (anna["train"], anna["validation"], anna["test"]) == ("8", "1", "2")
    assert (anna["loss initial"], anna["loss last"], anna["loss change"]) == ("3.4", "2.25", "-1.15")
    assert bert["loss change"] == "0.15"
    assert [row["reason"] for row in table_with(page, "reason")] == ["loss is not finite"] * 2
    seconds = {row["phase"]: row["all rounds"] for row in table_with(page, "phase")}
    assert seconds["training"] == "4"
    assert seconds["clients to server"] == "6"  # MB
    settings = {row["setting"]: row["value"] for row in table_with(page, "setting")}
    assert settings["lora.scaling"] == "sfed"
    gains = [chart for chart in page.charts() if chart["kind"] == "bars" and chart["signed"]]
    assert gains[0]["names"] == ["anna", "bert"]


def test_a_comparison_has_its_slopes_and_every_cell(tmp_path: Path) -> None:
    page = report_of(write_comparison(tmp_path / "grid", ranks=(8, 16, 32), clients=(2, 4, 8), seeds=(0, 1)))
    assert "36 finished" in page.texts
    assert len(table_with(page, "state")) == 36
    names = [line["name"] for chart in page.charts() if chart["kind"] == "lines" for line in chart["lines"]]
    slopes = {name for name in names if "slope" in name}
    assert "sfed, independent init, N = 2 (slope +0.00)" in slopes
    assert "lora, independent init, N = 8 (slope -0.50)" in slopes
    assert "lora, independent init, r = 16 (slope -0.50)" in slopes


def test_a_run_that_goes_on_and_one_without_rounds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    add_clients(run, {"anna": (3.4, 2.25)}, {})
    page = report_of(run)
    assert any(text.startswith("not finished: 1 rounds, last written ") for text in page.texts)
    assert table_with(page, "loss change")[0]["loss change"] == "-1.15"
    (run / "metrics.jsonl").unlink()
    assert "No round has finished yet." in report_of(run).texts


def test_cells_that_are_not_finished_are_in_the_comparison(tmp_path: Path) -> None:
    grid = write_comparison(tmp_path / "grid", clients=(2,))
    write_run(grid / "running", losses=[3.0], norms=[1.0], initial=None, rank=64)
    page = report_of(grid)
    assert "4 finished, 1 not finished" in page.texts
    states = {row["cell"]: row["state"] for row in table_with(page, "state")}
    assert states["running"].startswith("not finished: 1 rounds")
    (grid / "results.jsonl").unlink()
    assert len(table_with(report_of(grid), "state")) == 1


def test_several_runs_have_a_page_of_their_own(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, losses=[3.0, 2.0], norms=[1.0, 1.0], initial=3.5, scaling=name)
        for name in ("lora", "sfed")
    ]
    written = write_reports(runs, tmp_path / "out")
    assert written == [
        tmp_path / "lora" / "report.html",
        tmp_path / "sfed" / "report.html",
        tmp_path / "out/report.html",
    ]
    assert "2 finished" in read_page(written[2].read_text(encoding="utf-8")).texts


def test_nothing_is_loaded_and_only_two_scripts_may_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=3.5)
    page = report_of(run)
    assert [value for value in page.loads if not value.startswith("#")] == ["data:,"]
    text = (run / "report.html").read_text(encoding="utf-8")
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[0]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'none'"
    code = [content for kind, content in page.scripts if kind is None]
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in code]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert len(code) == 2


def test_text_from_files_stays_text(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=3.5)
    add_clients(plain, {f"c{at}": (3.4, 2.25) for at in range(len(HOSTILE))}, {"d": "no reason"})
    hostile = write_run(tmp_path / "hostile", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=3.5)
    add_clients(hostile, dict.fromkeys(HOSTILE, (3.4, 2.25)), {HOSTILE[0]: HOSTILE[1]})
    expected, page = report_of(plain), report_of(hostile)
    assert page.tags == expected.tags
    assert page.handlers == []
    assert page.loads == expected.loads
    assert len(page.scripts) == 3
    assert {row["client"] for row in table_with(page, "loss change")} >= set(HOSTILE[:5])
    gains = [chart for chart in page.charts() if chart["kind"] == "bars" and chart["signed"]]
    assert set(gains[0]["names"]) >= set(HOSTILE[:5])


def test_settings_and_names_of_cells_stay_text(tmp_path: Path) -> None:
    grid = write_comparison(tmp_path / "grid", ranks=(8, 16), clients=(2,))
    lines = [json.loads(line) for line in (grid / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = report_of(grid)
    for line, text in zip(lines, HOSTILE, strict=False):
        line |= {"cell": text}
        line["settings"]["lora.scaling"] += text
    (grid / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = report_of(grid)
    assert set(page.tags) == set(expected.tags)
    assert page.handlers == []
    assert len(page.scripts) == 3


def test_sixty_cells_stay_small(tmp_path: Path) -> None:
    grid = write_comparison(tmp_path / "grid", ranks=(1, 2, 4, 8, 16, 32), clients=(2, 4, 8, 16, 32))
    page = report_of(grid)
    assert len(table_with(page, "state")) == 60
    plotly = max(len(content) for kind, content in page.scripts if kind is None)
    assert (grid / "report.html").stat().st_size - plotly < 400_000


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run directory \(config.yaml is missing\) and no comparison"):
        write_reports([tmp_path])
    with pytest.raises(InputError, match="no directory was given"):
        write_reports([])
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=3.5)
    (run / "partition.json").write_text('{"clients": {"a": {"train": 3}}}', encoding="utf-8")
    with pytest.raises(StorageError, match="client 'a' lacks a list of rows"):
        write_reports([run])


def test_without_plotly_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=3.5)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(InputError, match=r"pip install 'sfedlora\[report\]'"):
        write_reports([run])
