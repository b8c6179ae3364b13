"""Read an HTML page back: nested as it should be, what it loads, its tables and the data of its charts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

__all__ = ["ReadPage", "read_page"]

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class ReadPage(HTMLParser):
    """What a page holds.

    Attributes:
        open: elements not closed so far; empty at the end of a well-formed page.
        loads: values of attributes that make a browser fetch something.
        handlers: attributes that would run code.
        tags: every element's name, in order.
        texts: text outside scripts and styles.
        tables: for each table its rows of cells.
        scripts: (type, content).
    """

    open: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    handlers: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    scripts: list[tuple[str | None, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute twice in <{tag}>"
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [value for name in ("src", "href", "data", "srcset", "action") if (value := given.get(name))]
        self.handlers += [name for name in names if name.startswith("on")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append((given.get("type"), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif inside != "style":
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def charts(self) -> list[dict[str, Any]]:
        """The data that the page's script draws."""
        (text,) = [text for kind, text in self.scripts if kind == "application/json"]
        found: list[dict[str, Any]] = json.loads(text)
        return found


def read_page(text: str) -> ReadPage:
    """Parse a page and check that it is nested well."""
    page = ReadPage()
    page.feed(text)
    page.close()
    assert page.open == []
    return page
