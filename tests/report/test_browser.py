"""The report in headless Chromium: charts are drawn, the console is silent, nothing is fetched, no other code runs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from sfedlora.report import write_reports
from sfedlora.report.live import make_server, server_address
from support.browser import CHROMIUM, DRIVER, Browser, browser
from support.comparison_files import write_comparison
from support.run_files import add_clients, write_run

HOSTILE = {
    "<img src=x onerror=window.pwned=1>": (3.0, 2.0),
    "</script><script>window.pwned=1</script>": (3.0, 2.5),
    "<a href='javascript:window.pwned=1'>x</a>": (3.0, 3.5),
}
ALL_DRAWN = """
const charts = [...document.querySelectorAll("[data-chart]")];
const next = charts.find((chart) => chart.querySelector("svg.main-svg") === null);
if (next !== undefined) { next.scrollIntoView(); }
return next === undefined && charts.length;
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with chromedriver on this machine"),
]


def paper(page: Browser) -> str:
    return str(page.run("return getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_comparison_is_drawn(tmp_path: Path, width: int, dark: bool) -> None:
    (path,) = write_reports([write_comparison(tmp_path / "grid", ranks=(8, 16, 32), clients=(2, 4), seeds=(0, 1))])
    with browser(tmp_path, width=width, dark=dark) as page:
        page.open(path.as_uri())
        page.wait_for(ALL_DRAWN)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
        assert page.run("return document.querySelectorAll('[data-chart]').length") > 15
        colours = paper(page), page.run("return document.getElementById('theme').click()"), paper(page)
        light, night = "rgb(255, 255, 255)", "rgb(20, 23, 26)"
        assert (colours[0], colours[2]) == ((night, light) if dark else (light, night))
        assert page.console() == []
        assert page.requests() == [path.as_uri()]


def test_tables_sort_by_value_and_legends_hide_lines(tmp_path: Path) -> None:
    (path,) = write_reports([write_comparison(tmp_path / "grid", ranks=(4, 32, 256), clients=(2,))])
    with browser(tmp_path) as page:
        page.open(path.as_uri())
        page.wait_for(ALL_DRAWN)
        column = "[...document.querySelectorAll('table')][0].tHead.rows[0]"
        page.run(f"[...{column}.cells].find((cell) => cell.textContent === 'lora.rank').firstChild.click()")
        rows = "[...[...document.querySelectorAll('table')][0].tBodies[0].rows]"
        at = page.run(f"return [...{column}.cells].findIndex((cell) => cell.textContent === 'lora.rank')")
        assert page.run(f"return {rows}.map((row) => row.cells[{at}].textContent)") == [
            "4",
            "4",
            "32",
            "32",
            "256",
            "256",
        ]
        page.run(f"{column}.cells[{at}].firstChild.click()")
        assert page.run(f"return {rows}[0].cells[{at}].textContent") == "256"
        shown = "return document.querySelectorAll('[data-chart] .scatterlayer .trace').length"
        before = page.run(shown)
        page.run("document.querySelector('.legend button').click()")
        page.wait_for(f"{shown} < {before}")
        assert page.console() == []


def test_hostile_names_run_nothing_even_without_the_policy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=3.5)
    add_clients(run, HOSTILE, {"<b>": "<script>window.pwned=1</script>"})
    (path,) = write_reports([run])
    bare = path.with_name("bare.html")
    text = path.read_text(encoding="utf-8")
    bare.write_text(text.replace('http-equiv="Content-Security-Policy"', 'name="no-policy"'), encoding="utf-8")
    with browser(tmp_path) as page:
        for address in (path.as_uri(), bare.as_uri()):
            page.open(address)
            page.wait_for(ALL_DRAWN)
            assert page.run("return window.pwned === undefined")
            assert page.run("return document.querySelectorAll('a[href^=javascript], main img').length") == 0
            ticks = page.run("return [...document.querySelectorAll('.ytick')].map((tick) => tick.textContent)")
            assert any(tick.startswith("<img src=x") for tick in ticks)
            assert page.console() == []
            assert page.requests() == [address]


def test_a_live_page_shows_a_round_that_finishes_while_it_is_open(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    server = make_server(run)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with browser(tmp_path) as page:
            page.open(server_address(server))
            page.wait_for(ALL_DRAWN)
            page.wait_for("return performance.getEntriesByName(location.href + 'version').length > 0")
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round_num": 2, "eval_loss": 2.5, "grad_norm_b": 0.5}) + "\n")
            page.wait_for("return document.querySelector('.status').textContent.startsWith('not finished: 2 rounds')")
            page.wait_for(ALL_DRAWN)
            assert page.console() == []
            assert all(url.startswith(server_address(server)) for url in page.requests())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
