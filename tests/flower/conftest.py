"""What Flower sets in the process of an app before it runs it."""

from __future__ import annotations

import pytest


@pytest.fixture
def flower_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made, as in a process that Flower started."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
