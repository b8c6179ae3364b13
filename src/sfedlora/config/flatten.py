"""Nested configuration values as dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten"]

VALUES = ("data.columns",)
"""Mappings that are values themselves, not sections."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = prefix + key
        is_section = isinstance(value, Mapping) and dotted not in VALUES
        flat |= flatten(value, f"{dotted}.") if is_section else {dotted: value}
    return flat
