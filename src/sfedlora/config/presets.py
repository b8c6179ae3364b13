"""Named starting points: one per method of the literature, with its paper's initialisation and scaling.

Explicit keys win over a preset. Only `sfed-lora` and the `*-independent` rows draw A independently; the others
broadcast one draw, as their papers and released code do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS"]


def _preset(method: str, scaling: str, init: str) -> Mapping[str, Any]:
    return MappingProxyType({"method": {"name": method}, "lora": {"scaling": scaling, "init": init}})


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sfed-lora": _preset("fedsa", "sfed", "independent"),
        "fedsa-lora": _preset("fedsa", "lora", "shared"),
        "fedsa-rslora": _preset("fedsa", "rslora", "shared"),
        "fedsa-lora-independent": _preset("fedsa", "lora", "independent"),
        "fedsa-rslora-independent": _preset("fedsa", "rslora", "independent"),
        "reinit": _preset("fedsa", "rslora", "reinit"),
        "fedit": _preset("fedit", "lora", "shared"),
        "ffa-lora": _preset("ffa", "lora", "shared"),
        "rolora": _preset("rolora", "lora", "shared"),
        "flora": _preset("flora", "lora", "shared"),
        "fedex-lora": _preset("fedex", "lora", "shared"),
        "flexlora": _preset("flexlora", "lora", "shared"),
        "hetlora": _preset("hetlora", "lora", "shared"),
        "lora-fair": _preset("fair", "lora", "shared"),
    }
)
