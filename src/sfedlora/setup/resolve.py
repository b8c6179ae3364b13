"""Every `auto` of a configuration replaced by what the run uses."""

from __future__ import annotations

import warnings

import torch

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.lora.base_model import BaseModel
from sfedlora.methods import Method
from sfedlora.types import Part

__all__ = ["resolve", "resolve_device"]

MAX_EVALUATED = 100
ADAPTIVE, ADAPTIVE_LEARNING_RATE = ("fedadam", "fedyogi"), 0.01
"""Server optimizers whose step is about the learning rate itself, and what `auto` gives them."""


def resolve_device(device: str) -> torch.device:
    """The device of a name; `auto` is CUDA, then MPS, then CPU.

    Raises:
        ConfigError: it is not here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise ConfigError(f"device: {device!r} cannot be used here ({first_line}); use auto or cpu") from None
    return resolved


def resolve(config: RunConfig, base: BaseModel, method: Method, device: torch.device, num_clients: int) -> RunConfig:
    """The configuration as the run directory records it.

    Raises:
        ConfigError: a cohort larger than the number of clients.
    """
    evaluated = config.evaluation.clients
    if evaluated == "auto":
        evaluated = "all" if num_clients <= MAX_EVALUATED else MAX_EVALUATED
    server_learning_rate = config.rounds.server_learning_rate
    if server_learning_rate == "auto":
        server_learning_rate = ADAPTIVE_LEARNING_RATE if config.rounds.server_optimizer in ADAPTIVE else 1.0
    cohort_size = config.rounds.cohort_size
    if cohort_size is not None and cohort_size > num_clients:
        raise ConfigError(f"rounds.cohort_size is {cohort_size} but there are only {num_clients} clients")
    return config.with_values(
        {
            "model.dtype": base.dtype,
            "lora.init": _resolve_init(config, method),
            "method.head": "personal" if Part.HEAD in method.personal_parts() else "shared",
            "partition.num_clients": num_clients,
            "evaluation.clients": evaluated,
            "rounds.server_learning_rate": server_learning_rate,
            "runner": "serial",
            "clients_per_batch": 1,
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
    )


def _resolve_init(config: RunConfig, method: Method) -> str:
    """`auto` by the scaling; shared where the method neither averages the draws nor lets a client keep its own."""
    init = config.lora.init
    if not method.traits.averages_a and Part.A not in method.personal_parts():
        if init in ("independent", "local") and config.lora.scaling != "sfed":  # sfed has its own warning
            warnings.warn(f"lora.init: method {method.name} has one A; {init} is taken as shared", stacklevel=2)
        return "shared"
    if init == "auto":
        return "independent" if config.lora.scaling == "sfed" else "shared"
    return init
