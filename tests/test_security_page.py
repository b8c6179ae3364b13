"""SECURITY.md and docs/promises.md name tests that exist, and list the licences of what is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.scripts import load_script

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/promises.md"])
def test_every_named_test_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = NAMED.findall(text)
    assert len(named) >= 10
    assert len(named) == text.count("::test_"), "a test is named in another form"
    for file, test in named:
        content = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test}(" in content, f"{page} names {file}::{test}, which is not there"


def test_every_section_about_an_attacker_says_what_is_not_protected() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for attacker in ("An honest but curious server", "A malicious client", "A network attacker"):
        assert f"**{attacker}" in text
    assert text.count("Not protected") >= 5


def test_the_table_of_licences_is_what_the_script_writes() -> None:
    script = load_script("write_licences")
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    assert script.licences_page(page) == page, "run python scripts/write_licences.py where all extras are installed"
    assert "not installed where this table was written" not in page
