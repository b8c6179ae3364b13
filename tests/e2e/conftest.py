"""One finished run on the committed tiny model, which several tests read but none changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfedlora import RunConfig, RunResult, run
from support.command_line import write_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Three rounds of two of three clients: one client may stay out of a round, as in real federations."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(
        folder / "run.yaml",
        data={"max_length": 64},
        rounds={"num_rounds": 3, "cohort_size": 2},
        lora={"rank": 4, "alpha": 8, "target_modules": "all-linear"},
        output=str(folder / "run"),
    )
    return run(RunConfig.load(config))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A run sets the threads of its process; the next test begins with the same number."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """The smallest configuration, writing to `tmp_path / "run"`."""
    return write_config(tmp_path / "run.yaml", output=str(tmp_path / "run"))
