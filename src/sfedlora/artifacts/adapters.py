"""What a client serves, written as a stock PEFT directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sfedlora.config import RunConfig
from sfedlora.lora.base_delta import adapter_with_deltas, total_deltas
from sfedlora.lora.peft_format import save_adapter
from sfedlora.lora.scaling import ScalingRule
from sfedlora.types import AdapterLayout, LoraSize, Tensors

__all__ = ["AdapterFacts", "adapter_facts", "write_served"]


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter directory says besides its factors; the same for all clients of a run.

    Attributes:
        layout: the adapted modules and the head.
        target_suffixes: how `target_modules` names the modules.
        base_model_name: what stock `from_pretrained` loads the base model by.
        task: decides PEFT's task type.
        rule, alpha, num_clients: what gamma comes from.
        dropout: dropout on the LoRA inputs.
    """

    layout: AdapterLayout
    target_suffixes: Sequence[str]
    base_model_name: str
    task: Literal["causal-lm", "sequence-classification"]
    rule: ScalingRule
    alpha: float
    num_clients: float
    dropout: float


def adapter_facts(
    config: RunConfig,
    *,
    layout: AdapterLayout,
    target_suffixes: Sequence[str],
    base_model_name: str,
    scaling_clients: float,
) -> AdapterFacts:
    """The facts of a run's adapters; `scaling_clients` is the N of the sfed rule."""
    lora = config.lora
    return AdapterFacts(
        layout,
        target_suffixes,
        base_model_name,
        config.model.task,
        lora.scaling,
        lora.alpha,
        scaling_clients,
        lora.dropout,
    )


def write_served(
    directory: Path, tensors: Tensors, extra: Tensors, size: LoraSize, facts: AdapterFacts, *, private: bool = False
) -> None:
    """Write an adapter as a stock PEFT directory.

    Base deltas are joined to the adapter; its gamma is then 1 and its rank that of both together.

    Args:
        directory: made if it does not exist.
        tensors: the complete adapter.
        extra: `ServerState.extra`, which may hold base deltas.
        size: its rank and gamma.
        facts: what else the directory says.
        private: open to its owner alone, whatever the umask.

    Raises:
        StorageError: it cannot be written.
    """
    rule, alpha, rank, num_clients = facts.rule, facts.alpha, size.rank, facts.num_clients
    deltas = total_deltas(extra)
    if deltas:
        tensors, rank = adapter_with_deltas(tensors, deltas, facts.layout, size.scaling)
        rule, alpha, num_clients = "lora", float(rank), 1.0
    save_adapter(
        directory,
        tensors,
        layout=facts.layout,
        rule=rule,
        alpha=alpha,
        rank=rank,
        num_clients=num_clients,
        dropout=0.0 if deltas else facts.dropout,
        task=facts.task,
        base_model_name=facts.base_model_name,
        target_suffixes=facts.target_suffixes,
        private=private,
    )
