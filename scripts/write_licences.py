"""Write the licences of the dependencies into docs/promises.md, from the metadata of what is installed.

Run it where all extras are installed: `python scripts/write_licences.py`. A test compares the page.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"
BEGIN, END = "<!-- licences -->", "<!-- /licences -->"


def direct_dependencies() -> dict[str, str]:
    """Distribution -> where it is asked for: `run`, or its extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"run": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, str] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            name = re.split(r"[\[><=! ]", requirement, maxsplit=1)[0]
            if name != project["name"]:
                found.setdefault(name, group)
    return found


def licence_of(name: str) -> str:
    """The licence that a distribution states: its expression, its classifiers, or its licence field."""
    facts: dict[str, Any] = metadata.metadata(name).json
    if expression := facts.get("license_expression"):
        return str(expression)
    prefix = "License :: OSI Approved :: "
    classifiers = [text.removeprefix(prefix) for text in facts.get("classifier", []) if text.startswith(prefix)]
    lines = str(facts.get("license") or "not stated").strip().splitlines()
    return ", ".join(classifiers) or lines[0][:60]


def licences_page(page: str) -> str:
    """The page with its table renewed; a distribution that is not installed here keeps its row."""
    before, rest = page.split(BEGIN)
    old, after = rest.split(END)
    rows = dict(re.findall(r"^\| `([^`]+)` \| \S+ \| (.+) \|$", old, flags=re.MULTILINE))
    lines = ["| package | for | licence |", "|---|---|---|"]
    for name, group in sorted(direct_dependencies().items(), key=lambda item: item[0].lower()):
        try:
            licence = licence_of(name)
        except metadata.PackageNotFoundError:
            licence = rows.get(name, "not installed where this table was written")
        lines.append(f"| `{name}` | {group} | {licence} |")
    return before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(licences_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
