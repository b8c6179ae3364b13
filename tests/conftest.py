"""What every test runs under: no hub, no tokenizer threads, one torch thread for each of the two workers.

With SFEDLORA_REQUIRE_DATA=1 (`make test-slow`) a test that would be skipped, for want of a package or a file, fails.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's small products in the oracles
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Generator

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isinstance(report.longrepr, tuple) and os.environ.get("SFEDLORA_REQUIRE_DATA") == "1":  # skipped, not xfailed
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[2]} (SFEDLORA_REQUIRE_DATA=1: what a test needs must be there)"
    return report
