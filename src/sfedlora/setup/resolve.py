"""Every `auto` of a configuration replaced by what the run uses."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.federation.label_head import behind_trunk
from sfedlora.federation.runners.ray_cluster import ray_is_installed
from sfedlora.lora.base_model import BaseModel
from sfedlora.lora.stackable import unstackable_targets
from sfedlora.methods import Method
from sfedlora.types import Part

__all__ = ["require_compiler", "resolve", "resolve_device", "resolve_rules", "resolve_workers", "why_not_stackable"]

MAX_EVALUATED = 100
TOKEN_CAPS = {"cpu": 512, "cuda": 16384, "mps": 4096}
"""Tokens of one forward pass beyond which stacking more clients gained nothing (CPU) or is expected to (others)."""
MIN_STACK, MAX_STACK = 2, 64
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


def require_compiler(device: torch.device) -> None:
    """Refuse `model.compile` where torch would find no compiler in the first step.

    Raises:
        ConfigError: there is none.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "model.compile: torch compiles for GPUs with Triton, which is not installed; set it false"
            )
        return
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"model.compile: torch compiles with a C++ compiler, and {compiler} is not there; install it, name another "
            "one in the environment variable CXX, or set model.compile: false"
        )


def resolve(
    config: RunConfig,
    base: BaseModel,
    method: Method,
    device: torch.device,
    *,
    num_clients: int,
    median_length: int,
    targets: Sequence[str],
) -> RunConfig:
    """The configuration as the run directory records it.

    Args:
        config: as given.
        base: the base model.
        method: the method.
        device: where it runs.
        num_clients: number of clients.
        median_length: tokens of the median example.
        targets: paths of the adapted modules.

    Raises:
        ConfigError: a cohort larger than the number of clients, adapters that cannot be stacked as asked, or workers
            without a device each.
    """
    rules = resolve_rules(config, method, num_clients=num_clients)
    clients_per_batch = _clients_per_batch(config, base, method, device, num_clients, median_length, targets)
    workers = resolve_workers(config.workers, device, _largest_cohort(config, method, num_clients))
    return config.with_values(
        {
            **rules,
            "model.dtype": base.dtype,
            "runner": "serial" if clients_per_batch == 1 else "batched",
            "clients_per_batch": clients_per_batch,
            "workers": workers,
            "device": str(device),
            "threads": config.threads or max(1, torch.get_num_threads() // workers),
        }
    )


def resolve_rules(config: RunConfig, method: Method, *, num_clients: int) -> dict[str, Any]:
    """What every `auto` that concerns the federation, not a machine, stands for: dotted key -> value.

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
    return {
        "lora.init": _resolve_init(config, method),
        "method.head": "personal" if Part.HEAD in method.personal_parts() else "shared",
        "partition.num_clients": num_clients,
        "evaluation.clients": evaluated,
        "rounds.server_learning_rate": server_learning_rate,
    }


def _clients_per_batch(  # noqa: PLR0917 - what `resolve` was given
    config: RunConfig,
    base: BaseModel,
    method: Method,
    device: torch.device,
    num_clients: int,
    median_length: int,
    targets: Sequence[str],
) -> int:
    """Clients in one forward pass: asked for, or as many as stay under the device's token cap."""
    cohort_size, asked = _largest_cohort(config, method, num_clients), config.clients_per_batch
    one_by_one = config.privacy.example_clip_norm is not None
    if config.runner == "serial" or asked == 1 or cohort_size == 1 or one_by_one:
        return 1
    own_tokens = max(1, config.local.batch_size * median_length)
    fitting = min(cohort_size, MAX_STACK, TOKEN_CAPS[device.type] // own_tokens)
    chosen = min(asked, cohort_size) if asked != "auto" else fitting
    if config.runner == "auto" and chosen < MIN_STACK:
        return 1
    refusal = why_not_stackable(config, base, targets)
    if not refusal:
        return max(MIN_STACK, chosen)
    if config.runner == "auto" and asked == "auto":
        return 1
    given = "runner: batched" if config.runner == "batched" else f"clients_per_batch: {asked}"
    raise ConfigError(f"{given}: {refusal}; use runner: serial, or lora.target_modules without it")


def why_not_stackable(config: RunConfig, base: BaseModel, targets: Sequence[str]) -> str:
    """What is against several clients' adapters in one forward pass; empty if nothing is."""
    behind = behind_trunk(base.model, targets) if config.model.task == "causal-lm" else []
    if behind:
        return f"adapters of {behind[0]} cannot be stacked, because labelled tokens only get there"
    stray = unstackable_targets(base.model, targets)
    if stray:
        return (
            f"adapters of {stray[0]} cannot be stacked, because this model applies it to something else than a whole "
            "batch as well (position embeddings, tokens of a router)"
        )
    return ""


def _largest_cohort(config: RunConfig, method: Method, num_clients: int) -> int:
    return 1 if method.traits.pools_data else min(config.rounds.cohort_size or num_clients, num_clients)


def resolve_workers(workers: int | Literal["auto"], device: torch.device, cohort_size: int) -> int:
    """Worker processes: as many as asked for, or one for each of several GPUs; no more than a cohort has clients.

    Raises:
        ConfigError: several workers and one device.
    """
    one_device = device.type == "mps" or device.index is not None
    if workers == "auto":
        workers = torch.cuda.device_count() if device.type == "cuda" and not one_device else 1
        if min(workers, cohort_size) > 1 and not ray_is_installed():
            warnings.warn(
                f"workers: auto would use {workers} GPUs with Ray, which is not installed, and uses one; "
                "pip install 'sfedlora[ray]', or set workers: 1",
                stacklevel=2,
            )
            workers = 1
    if workers > 1 and one_device:
        raise ConfigError(
            f"workers: {workers} workers need a GPU each, but device: {device} is one; use device: cuda, or cpu"
        )
    return max(1, min(workers, cohort_size))


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
