"""sfedlora: federated LoRA fine-tuning that stays stable at any rank and any number of clients.

from sfedlora import RunConfig, peft_config, run, scaling_factor

The names are loaded on first use: importing the package alone does not import torch, so the command line answers at
once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfedlora.config import RunConfig as RunConfig
    from sfedlora.experiment import RunResult as RunResult
    from sfedlora.experiment import resume as resume
    from sfedlora.experiment import run as run
    from sfedlora.lora.scaling import effective_clients as effective_clients
    from sfedlora.lora.scaling import peft_config as peft_config
    from sfedlora.lora.scaling import scaling_factor as scaling_factor

__all__ = ["RunConfig", "RunResult", "effective_clients", "peft_config", "resume", "run", "scaling_factor"]

_HOMES = {
    "RunConfig": "sfedlora.config",
    "RunResult": "sfedlora.experiment",
    "effective_clients": "sfedlora.lora.scaling",
    "peft_config": "sfedlora.lora.scaling",
    "resume": "sfedlora.experiment",
    "run": "sfedlora.experiment",
    "scaling_factor": "sfedlora.lora.scaling",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
