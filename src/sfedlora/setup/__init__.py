"""From a configuration to a federation that is ready for round 1: data, partition, base model, adapter, scaling.

Every `auto` is replaced here; the resolved configuration is what the run directory records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from sfedlora.config import RunConfig
from sfedlora.data.encoded import EncodedData
from sfedlora.data.partition import ClientSplit
from sfedlora.errors import ConfigError
from sfedlora.federation.client import LocalTraining, TrainingSetup
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.initialize import InitialA
from sfedlora.federation.robust import RobustRule
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.server_optimizer import ServerOptimizer
from sfedlora.federation.state import POOLED_ID, Federation, RoundSettings
from sfedlora.lora.base_model import BaseModel, load_base_model
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.targets import find_head_modules, find_targets
from sfedlora.methods import Method, make_method
from sfedlora.privacy.accounting import require_accounting
from sfedlora.privacy.examples import ExamplePrivacy, most_uses
from sfedlora.privacy.mechanism import Privacy
from sfedlora.seeds import derive_seed
from sfedlora.setup.adapter import (
    chosen_init,
    client_ranks,
    draw_initial_a,
    initial_adapter,
    lora_sizes,
    require_ranks,
    scaling_clients,
)
from sfedlora.setup.dataset import deal_examples, find_label_names, load_external, partition_record
from sfedlora.setup.dataset import encode_examples as encode_examples
from sfedlora.setup.dataset import load_source as load_source
from sfedlora.setup.environment import environment_record
from sfedlora.setup.resolve import resolve, resolve_device
from sfedlora.setup.workers import Fingerprint, fingerprint, with_workers
from sfedlora.types import LoraSizes

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
    base = load_base_model(
        config.model.source,
        task=config.model.task,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=str(device),
        num_labels=len(label_names) or None,
        label_names=label_names or None,
        seed=derive_seed(config.seed, "new_weights"),
    )
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
    initial = draw_initial_a(resolved, method, splits, resident)
    num_scaling_clients = scaling_clients(resolved, method, initial, len(splits))
    sizes = lora_sizes(resolved, ranks, num_scaling_clients)
    external = load_external(resolved)
    encoded = {split: encode_examples(resolved, rows, base, label_names) for split, rows in external.items()}
    federation = _federation(resolved, method, data, splits, resident, base, initial, sizes, encoded)
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


def _federation(  # noqa: PLR0917 - the parts of a federation, each made by a function above
    config: RunConfig,
    method: Method,
    data: EncodedData,
    splits: Mapping[str, ClientSplit],
    resident: ResidentModel,
    base: BaseModel,
    initial: InitialA,
    sizes: LoraSizes,
    external: Mapping[str, EncodedData],
) -> Federation:
    local, rounds = config.local, config.rounds
    participants: dict[str, Sequence[int]] = {client_id: split.train for client_id, split in splits.items()}
    local_steps = local.local_steps
    if method.traits.pools_data:
        cohort_size = rounds.cohort_size or len(splits)
        participants = {POOLED_ID: sorted(index for indices in participants.values() for index in indices)}
        local_steps = None if local_steps is None else local_steps * cohort_size
    training = LocalTraining(
        optimizer=local.optimizer,
        learning_rate_a_ratio=local.learning_rate_a_ratio,
        weight_decay=local.weight_decay,
        batch_size=local.batch_size,
        accumulation=local.accumulation,
        local_steps=local_steps,
        local_epochs=local.local_epochs,
        max_grad_norm=local.max_grad_norm,
        keep_optimizer_state=local.optimizer_state == "keep",
        proximal_mu=rounds.proximal_mu,
        example_privacy=_example_privacy(config),
    )
    pad_token_id = base.tokenizer.pad_token_id
    if not isinstance(pad_token_id, int):
        raise ConfigError(f"model.source: {config.model.source} has no pad token")
    return Federation(
        resident=resident,
        runner=_runner(config, TrainingSetup(resident, data, training, config.model.task, pad_token_id, config.seed)),
        method=method,
        data=data,
        splits=splits,
        participants=participants,
        external=external,
        initial=initial_adapter(resident, initial),
        init=chosen_init(config),
        sizes=sizes,
        effective_clients=initial.effective_clients,
        task=config.model.task,
        pad_token_id=pad_token_id,
        batching=EvalBatching(config.evaluation.batch_size, config.evaluation.max_batch_tokens),
        rounds=RoundSettings(
            num_rounds=rounds.num_rounds,
            cohort_size=None if method.traits.pools_data else rounds.cohort_size,
            weighting=rounds.weighting,
            learning_rate=local.learning_rate,
            schedule=local.schedule,
            warmup_rounds=local.warmup_rounds,
            evaluate_every=config.evaluation.every,
            evaluated=_evaluated(config),
            server_optimizer=_server_optimizer(config),
            robust=_robust_rule(config),
            privacy=_privacy(config, len(splits)),
            example_privacy=training.example_privacy,
            most_uses=_most_uses(training, participants),
        ),
        seed=config.seed,
    )


def _runner(config: RunConfig, setup: TrainingSetup) -> Runner:
    if config.runner == "batched" and isinstance(config.clients_per_batch, int):
        return BatchedRunner(setup, config.clients_per_batch)
    return SerialRunner(setup)


def _server_optimizer(config: RunConfig) -> ServerOptimizer | None:
    rounds = config.rounds
    if rounds.server_optimizer == "none":
        return None
    if rounds.server_learning_rate == "auto":
        raise ConfigError("rounds.server_learning_rate: auto was not resolved")
    return ServerOptimizer(
        rounds.server_optimizer,
        rounds.server_learning_rate,
        rounds.server_momentum,
        rounds.server_beta2,
        rounds.server_tau,
    )


def _robust_rule(config: RunConfig) -> RobustRule | None:
    if config.robust == "none":
        return None
    return RobustRule(config.robust, config.robust_attackers or 0, config.robust_taken or 1)


def _privacy(config: RunConfig, num_clients: int) -> Privacy | None:
    section = config.privacy
    if section.mode == "none" or section.clip_norm is None or section.noise_multiplier is None:
        return None
    require_accounting()
    return Privacy(
        section.mode,
        section.clip_norm,
        section.noise_multiplier,
        section.delta,
        num_clients=num_clients,
        cohort_size=config.rounds.cohort_size or num_clients,
        noise_seed=derive_seed(config.seed, "privacy noise") if section.noise == "seeded" else None,
    )


def _example_privacy(config: RunConfig) -> ExamplePrivacy | None:
    section = config.privacy
    if section.example_clip_norm is None or section.example_noise_multiplier is None:
        return None
    require_accounting()
    seed = derive_seed(config.seed, "privacy noise") if section.noise == "seeded" else None
    return ExamplePrivacy(section.example_clip_norm, section.example_noise_multiplier, section.delta, seed)


def _most_uses(training: LocalTraining, participants: Mapping[str, Sequence[int]]) -> int:
    return max(
        most_uses(
            len(rows),
            batch_size=training.batch_size,
            local_steps=training.local_steps,
            local_epochs=training.local_epochs,
        )
        for rows in participants.values()
    )


def _evaluated(config: RunConfig) -> Literal["all", "cohort"] | int:
    clients = config.evaluation.clients
    if clients == "auto":
        raise ConfigError("evaluation.clients: auto was not resolved")
    return clients
