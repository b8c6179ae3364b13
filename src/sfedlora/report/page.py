"""A report as one HTML file: everything is inside, nothing is loaded, and text from files cannot become markup or code.

Text is escaped where it enters HTML, JSON or a chart, and a content security policy lets the browser run the two
scripts of this file alone, known by their digests, and load nothing. Charts are drawn by plotly.js (MIT), which comes
with the Python package `plotly` (extra `report`); tables are plain HTML and can be read without scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from sfedlora.errors import InputError
from sfedlora.report.blocks import Bars, Block, Dots, Grid, Note, Section, Table
from sfedlora.report.panels import PALETTE, Panel, line_label, line_styles

__all__ = ["Page", "plotly_source", "render"]

LONGEST_NAME = 300
"""Characters of a name that a chart keeps."""


@dataclass(frozen=True)
class Page:
    """What one report says.

    Attributes:
        title: heading.
        status: one line below it.
        facts: names and values at the top.
        sections: the rest.
    """

    title: str
    status: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render(page: Page, *, plotly: str, live: bool = False) -> str:
    """The whole file.

    Args:
        page: what it says.
        plotly: source text of plotly.js.
        live: whether it is served while a run goes on: plotly.js is then fetched from the server, once, and the page
            asks the server for news.
    """
    charts: list[dict[str, Any]] = []
    body = "\n".join(_section(section, charts) for section in page.sections)
    script = _asset("page.js")
    library = '<script src="plotly.js"></script>' if live else f"<script>{plotly}</script>"
    allowed, connect = ("'self'", "'self'") if live else (_digest(plotly), "'none'")
    policy = (
        f"default-src 'none'; script-src {allowed} {_digest(script)}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    facts = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in page.facts)
    contents = "".join(f'<a href="#{_anchor(section)}">{_escape(section.title)}</a>' for section in page.sections)
    return f"""<!DOCTYPE html>
<html lang="en"{' data-live="yes"' if live else ""}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}</style>
</head>
<body>
<header>
<h1>{_escape(page.title)}</h1>
<button type="button" id="theme" aria-label="Switch between light and dark">light / dark</button>
</header>
<main id="content">
<p class="status">{_escape(page.status)}</p>
<dl class="facts">{facts}</dl>
<nav>{contents}</nav>
{body}
<script type="application/json" id="charts">{_json(charts)}</script>
</main>
<footer>Written by sfedlora. Lines are means over seeds, bands reach from the lowest to the highest seed.</footer>
{library}
<script>{script}</script>
</body>
</html>
"""


def plotly_source() -> str:
    """Source text of plotly.js.

    Raises:
        InputError: the package plotly is missing.
    """
    try:
        text = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError("the report needs plotly; install it with: pip install 'sfedlora[report]'") from None
    return text.replace("</script", "<\\/script")


def _panels(section: Section) -> list[Panel]:
    grids = [block for block in section.blocks if isinstance(block, Grid)]
    return [chart for grid in grids for chart in grid.charts if isinstance(chart, Panel)]


def _section(section: Section, charts: list[dict[str, Any]]) -> str:
    styles = line_styles(_panels(section))
    inner = "\n".join(_block(block, charts, styles) for block in section.blocks)
    title = f'<summary><h2 id="{_anchor(section)}">{_escape(section.title)}</h2></summary>'
    return f"<details{' open' if section.is_open else ''}>{title}\n{inner}\n</details>"


def _anchor(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.title.lower())


def _block(block: Block, charts: list[dict[str, Any]], styles: Mapping[tuple[str, str], tuple[int, int]]) -> str:
    if isinstance(block, Note):
        return f"<p>{_escape(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    cells = []
    for chart in block.charts:
        cells.append(
            f'<figure><figcaption>{_escape(chart.title)}</figcaption><div data-chart="{len(charts)}"></div></figure>'
        )
        charts.append(_chart(chart, styles))
    return f'<div class="charts">{"".join(cells)}</div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{_escape(name)}</button></th>' for name in table.columns)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return '<td class="none">-</td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        shown = f"{value:.5g}" if isinstance(value, float) else str(value)
        return f'<td class="number" data-sort="{value!r}">{shown}</td>'
    return f"<td>{_escape(str(value))}</td>"


def _chart(chart: Panel | Bars | Dots, styles: Mapping[tuple[str, str], tuple[int, int]]) -> dict[str, Any]:
    """What page.js draws; it escapes names, because plotly.js reads them as a small HTML."""
    if isinstance(chart, Bars):
        return {
            "kind": "bars",
            "valueLabel": chart.value_label,
            "names": [_name(name) for name in chart.names],
            "series": [{"name": name, "values": list(map(_finite, values))} for name, values in chart.series.items()],
            "sideways": chart.sideways,
            "signed": chart.signed,
        }
    if isinstance(chart, Dots):
        groups = [
            {"name": _name(name), "dots": [[_name(dot), _finite(value)] for dot, value in dots]}
            for name, dots in chart.groups.items()
        ]
        return {"kind": "dots", "valueLabel": chart.value_label, "groups": groups}
    lines = [
        {
            "name": _name(line_label(chart, line)),
            "colour": styles[line.method, line.size][0] % len(PALETTE),
            "form": styles[line.method, line.size][1],
            "points": [list(point) for point in line.points],
        }
        for line in chart.lines
    ]
    labels = {"xLabel": chart.x_label, "yLabel": chart.y_label}
    return {"kind": "lines", **labels, "logX": chart.log_x, "logY": chart.log_y, "lines": lines}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _name(text: str) -> str:
    return _plain(text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}...")


def _escape(text: str) -> str:
    return html.escape(_plain(text), quote=True)


def _plain(text: str) -> str:
    """Text with a question mark for everything that no HTML document may hold."""
    known = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter >= " " or letter in "\n\t" else "?" for letter in known)


def _json(values: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(values, allow_nan=False)  # ASCII: line separators are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files("sfedlora.report") / name).read_text(encoding="utf-8")
