"""Content of environment.json: what a run was made with."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from sfedlora.config import RunConfig
from sfedlora.federation.initialize import InitialA
from sfedlora.federation.record import scaling_record
from sfedlora.lora.base_model import BaseModel, Skeleton
from sfedlora.types import LoraSizes

__all__ = ["environment_record", "library_versions"]


def library_versions() -> dict[str, str]:
    """Versions of what results depend on."""
    packages = ("sfedlora", "torch", "transformers", "peft", "safetensors", "datasets", "tokenizers", "numpy")
    return {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}


def environment_record(
    config: RunConfig, base: BaseModel | Skeleton, initial: InitialA, scaling_clients: float, sizes: LoraSizes
) -> dict[str, Any]:
    """Versions, device, threads, seed, base model, and the counts behind gamma."""
    return {
        "schema_version": 1,
        "versions": library_versions(),
        "platform": platform.platform(),
        "device": config.device,
        "threads": config.threads,
        "seed": config.seed,
        "base_model": {
            "source": config.model.source,
            "loads_from": base.name_or_path,
            "sha256": base.sha256,
            "dtype": base.dtype,
            "trained_in_full": list(base.layout.head_modules if isinstance(base, Skeleton) else base.new_modules),
        },
        "scaling": {
            "rule": config.lora.scaling,
            "gamma": scaling_record(sizes, list(sizes.clients)),
            "ranks": {client_id: size.rank for client_id, size in sizes.clients.items()} or sizes.server.rank,
            "num_clients": scaling_clients,
            "effective_clients": initial.effective_clients,
            "averaged_effective_clients": initial.averaged_clients,
            "measured_effective_clients": initial.measured_clients,
        },
    }
