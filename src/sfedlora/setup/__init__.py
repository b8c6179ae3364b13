"""From a configuration to a federation that is ready for round 1: data, partition, base model, adapter, scaling.

Every `auto` is replaced here; the resolved configuration is what the run directory records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sfedlora.config import RunConfig
from sfedlora.federation.state import Federation
from sfedlora.lora.base_model import BaseModel
from sfedlora.lora.inject import adapt
from sfedlora.lora.targets import find_head_modules, find_targets
from sfedlora.methods import make_method
from sfedlora.setup.adapter import (
    client_ranks,
    draw_initial_a,
    initial_adapter,
    lora_sizes,
    require_ranks,
    scaling_clients,
)
from sfedlora.setup.build import build_federation
from sfedlora.setup.dataset import deal_examples, find_label_names, load_external, partition_record
from sfedlora.setup.dataset import encode_examples as encode_examples
from sfedlora.setup.dataset import load_source as load_source
from sfedlora.setup.environment import environment_record
from sfedlora.setup.model import load_model
from sfedlora.setup.resolve import require_compiler, resolve, resolve_device
from sfedlora.setup.workers import Fingerprint, fingerprint, with_workers
from sfedlora.types import Part

__all__ = ["Prepared", "encode_examples", "load_source", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A federation ready for round 1.

    Attributes:
        config: the resolved configuration.
        federation: the federation.
        base: the base model and its tokenizer.
        label_names: class names for classification, else empty.
        scaling_clients: the N that enters the sfed rule.
        partition: content of partition.json.
        environment: content of environment.json.
    """

    config: RunConfig
    federation: Federation
    base: BaseModel
    label_names: tuple[str, ...]
    scaling_clients: float
    partition: Mapping[str, Any]
    environment: Mapping[str, Any]


def prepare(config: RunConfig) -> Prepared:
    """Load data and model and build the federation.

    Raises:
        InputError: data, model and configuration do not fit together; the message says where.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    method = make_method(config.method.name, config.method.head)
    examples = load_source(config, config.data.source)
    label_names = find_label_names(config, examples)
    device = resolve_device(config.device)
    if config.model.compile:
        require_compiler(device)
    base = load_model(config, device, label_names)
    data = encode_examples(config, examples, base, label_names)
    splits = deal_examples(config, examples, data)
    ranks = client_ranks(config, list(splits))
    if method.traits.caps_rank:
        head_paths = find_head_modules(base.model, base.new_modules)
        targets = find_targets(base.model, config.lora.target_modules, head_paths=head_paths)
        require_ranks(targets, max(ranks.values()), config.method.name)
    resident = adapt(
        base.model,
        target_modules=config.lora.target_modules,
        rank=max(ranks.values()),
        dropout=config.lora.dropout,
        head_modules=base.new_modules,
    )
    if config.model.gradient_checkpointing:
        resident.enable_gradient_checkpointing()
    if config.model.compile:
        resident.compile_layers()
    training_rows = [row for split in splits.values() for row in split.train]
    resolved = resolve(
        config,
        base,
        method,
        device,
        num_clients=len(splits),
        median_length=int(np.median(data.lengths[training_rows])),
        targets=[target.path for target in resident.layout.targets],
    )
    torch.set_num_threads(resolved.threads or torch.get_num_threads())
    num_examples = {client_id: len(split.train) for client_id, split in splits.items()}
    initial = draw_initial_a(resolved, method, num_examples, resident.layout, resident.rank)
    num_scaling_clients = scaling_clients(resolved, method, initial, len(splits))
    sizes = lora_sizes(resolved, ranks, num_scaling_clients)
    external = load_external(resolved)
    encoded = {split: encode_examples(resolved, rows, base, label_names) for split, rows in external.items()}
    head = resident.read([Part.HEAD])
    federation = build_federation(
        resolved,
        method,
        resident=resident,
        base=base,
        data=data,
        splits=splits,
        external=encoded,
        initial=initial_adapter(resident.layout, initial, head, resident.rank),
        sizes=sizes,
        effective_clients=initial.effective_clients,
    )
    partition = partition_record(examples, splits)
    environment = environment_record(resolved, base, initial, num_scaling_clients, sizes)
    if resolved.workers != 1:
        expected = fingerprint(resolved, partition, environment)
        federation = with_workers(federation, resolved, expected, _prepare_worker)
    environment |= {"external_sha256": {split: rows.sha256 for split, rows in external.items()}}
    return Prepared(resolved, federation, base, label_names, num_scaling_clients, partition, environment)


def _prepare_worker(config: RunConfig) -> tuple[Federation, Fingerprint]:
    """What a worker prepares in its own process."""
    prepared = prepare(config)
    return prepared.federation, fingerprint(prepared.config, prepared.partition, prepared.environment)
