"""The base model that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfedlora.config import RunConfig
from sfedlora.lora.base_model import BaseModel, load_base_model
from sfedlora.seeds import derive_seed

__all__ = ["load_model"]


def load_model(config: RunConfig, device: torch.device, label_names: Sequence[str]) -> BaseModel:
    """Load it for the run's task; `label_names` in the order of their ids, empty for causal-lm.

    Raises:
        InputError: it cannot be used.
    """
    return load_base_model(
        config.model.source,
        task=config.model.task,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=str(device),
        num_labels=len(label_names) or None,
        label_names=label_names or None,
        seed=derive_seed(config.seed, "new_weights"),
    )
