"""From a resolved configuration and its loaded parts to a federation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from sfedlora.config import RunConfig
from sfedlora.data.encoded import EncodedData
from sfedlora.data.partition import ClientSplit
from sfedlora.errors import ConfigError
from sfedlora.federation.client import LocalTraining, TrainingSetup
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.robust import RobustRule
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.server_optimizer import ServerOptimizer
from sfedlora.federation.state import POOLED_ID, Federation, RoundSettings
from sfedlora.lora.base_model import BaseModel
from sfedlora.lora.inject import ResidentModel
from sfedlora.methods import Method
from sfedlora.privacy.accounting import require_accounting
from sfedlora.privacy.examples import ExamplePrivacy, most_uses
from sfedlora.privacy.mechanism import Privacy
from sfedlora.seeds import derive_seed
from sfedlora.setup.adapter import chosen_init
from sfedlora.types import LoraSizes, Tensors

__all__ = ["build_federation", "round_settings"]


def build_federation(
    config: RunConfig,
    method: Method,
    *,
    resident: ResidentModel,
    base: BaseModel,
    data: EncodedData,
    splits: Mapping[str, ClientSplit],
    external: Mapping[str, EncodedData],
    initial: Tensors,
    sizes: LoraSizes,
    effective_clients: float,
) -> Federation:
    """Put the parts of a federation together.

    Args:
        config: resolved.
        method: the method.
        resident: the adapted base model.
        base: what it was made from.
        data: all encoded examples; like the following, as in `Federation`.
        splits: each client's examples.
        external: further example sets.
        initial: the complete adapter before round 1.
        sizes: rank and gamma.
        effective_clients: the count that N stands for.

    Raises:
        ConfigError: a tokenizer without a pad token.
    """
    local_steps = config.local.local_steps
    participants: dict[str, Sequence[int]] = {client_id: split.train for client_id, split in splits.items()}
    if method.traits.pools_data:
        cohort_size = config.rounds.cohort_size or len(splits)
        participants = {POOLED_ID: sorted(index for indices in participants.values() for index in indices)}
        local_steps = None if local_steps is None else local_steps * cohort_size
    pad_token_id = base.tokenizer.pad_token_id
    if not isinstance(pad_token_id, int):
        raise ConfigError(f"model.source: {config.model.source} has no pad token")
    training = _local_training(config, local_steps)
    return Federation(
        resident=resident,
        runner=_runner(config, TrainingSetup(resident, data, training, config.model.task, pad_token_id, config.seed)),
        method=method,
        data=data,
        splits=splits,
        participants=participants,
        external=external,
        initial=initial,
        init=chosen_init(config),
        sizes=sizes,
        effective_clients=effective_clients,
        task=config.model.task,
        pad_token_id=pad_token_id,
        batching=EvalBatching(config.evaluation.batch_size, config.evaluation.max_batch_tokens),
        rounds=round_settings(
            config,
            method,
            {client_id: len(rows) for client_id, rows in participants.items()},
            local_steps=training.local_steps,
        ),
        seed=config.seed,
    )


def round_settings(
    config: RunConfig, method: Method, num_examples: Mapping[str, int], *, local_steps: int | None
) -> RoundSettings:
    """How rounds are run.

    Args:
        config: resolved.
        method: the method.
        num_examples: participant -> examples that it trains on.
        local_steps: optimizer steps of a participant in a round; None for `local.local_epochs`.
    """
    rounds, local = config.rounds, config.local
    return RoundSettings(
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
        privacy=_privacy(config, len(num_examples)),
        example_privacy=_example_privacy(config),
        most_uses=_most_uses(config, num_examples, local_steps),
    )


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


def _example_privacy(config: RunConfig) -> ExamplePrivacy | None:
    section = config.privacy
    if section.example_clip_norm is None or section.example_noise_multiplier is None:
        return None
    require_accounting()
    seed = derive_seed(config.seed, "privacy noise") if section.noise == "seeded" else None
    return ExamplePrivacy(section.example_clip_norm, section.example_noise_multiplier, section.delta, seed)


def _most_uses(config: RunConfig, num_examples: Mapping[str, int], local_steps: int | None) -> int:
    batch_size, local_epochs = config.local.batch_size, config.local.local_epochs
    return max(
        most_uses(count, batch_size=batch_size, local_steps=local_steps, local_epochs=local_epochs)
        for count in num_examples.values()
    )


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


def _local_training(config: RunConfig, local_steps: int | None) -> LocalTraining:
    local = config.local
    return LocalTraining(
        optimizer=local.optimizer,
        learning_rate_a_ratio=local.learning_rate_a_ratio,
        weight_decay=local.weight_decay,
        batch_size=local.batch_size,
        accumulation=local.accumulation,
        local_steps=local_steps,
        local_epochs=local.local_epochs,
        max_grad_norm=local.max_grad_norm,
        keep_optimizer_state=local.optimizer_state == "keep",
        proximal_mu=config.rounds.proximal_mu,
        example_privacy=_example_privacy(config),
    )


def _runner(config: RunConfig, setup: TrainingSetup) -> Runner:
    if config.runner == "batched" and isinstance(config.clients_per_batch, int):
        return BatchedRunner(setup, config.clients_per_batch)
    return SerialRunner(setup)


def _evaluated(config: RunConfig) -> Literal["all", "cohort"] | int:
    clients = config.evaluation.clients
    if clients == "auto":
        raise ConfigError("evaluation.clients: auto was not resolved")
    return clients
