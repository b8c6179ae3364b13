"""Every data test has its own, empty cache folders."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SFEDLORA_CACHE", str(root))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
    return root
