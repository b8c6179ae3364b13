"""The adapted models that the contract is judged on, one of each layout per file."""

from __future__ import annotations

import pytest

from contract.scenes import LAYOUTS
from sfedlora.lora.inject import ResidentModel


@pytest.fixture(params=LAYOUTS, scope="module")
def resident(request: pytest.FixtureRequest) -> ResidentModel:
    return LAYOUTS[request.param]()


@pytest.fixture(scope="module")
def small() -> ResidentModel:
    """One layout, with a head, for tests that only look at tensors."""
    return LAYOUTS["linear+head"]()
