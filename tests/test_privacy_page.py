"""The tables of docs/privacy.md are those of the rules, and say what they seem to say."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import ModuleType

import pytest

from sfedlora.methods import METHODS
from support.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("write_privacy_tables")


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.privacy_page(PAGE) == PAGE, "run python scripts/write_privacy_tables.py"


def test_a_pair_is_allowed_where_both_tables_say_so(script: ModuleType) -> None:
    for method in METHODS:
        for left, right in itertools.combinations(script.OPTIONS.values(), 2):
            both = script.is_allowed(method, left, right)
            single = script.is_allowed(method, left) and script.is_allowed(method, right)
            assert both == (single and script.is_allowed(script.EXAMPLE, left, right)), (method, left, right)


def test_a_setting_is_allowed_where_both_tables_say_so(script: ModuleType) -> None:
    for method in METHODS:
        for setting, option in itertools.product(script.SETTINGS.values(), script.OPTIONS.values()):
            expected = script.is_allowed(method, option) and script.is_allowed(script.EXAMPLE, setting, option)
            assert script.is_allowed(method, setting, option) == expected, (method, setting, option)


def rows() -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ("`fedsa`", "yes yes yes yes yes yes"),
        ("`fedit`", "no no yes yes yes yes"),
        ("`flora`", "no no yes no yes no"),
        ("`local`", "no no no no no no"),
        ("`centralized`", "no no no no no no"),
        ("`privacy.mode: central`", "no no no yes no no"),
        ("`rounds.weighting: examples`", "yes yes yes no no yes"),
        ("`lora.init: local`", "no no no no yes yes"),
    ],
)
def test_rows_that_are_known(row: str, cells: str) -> None:
    assert rows()[row] == cells.split()
