"""From a configuration to a federation that is ready for round 1: data, partition, base model, adapter, scaling.

Every `auto` is replaced here; the resolved configuration is what the run directory records.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sfedlora.config import RunConfig
from sfedlora.data.encode import encode_causal, encode_classification
from sfedlora.data.encoded import EncodedData
from sfedlora.data.examples import Examples, load_examples
from sfedlora.data.labels import number_labels
from sfedlora.data.partition import ClientSplit, assign_clients, safe_directory_name, split_client
from sfedlora.errors import ConfigError
from sfedlora.federation.client import LocalTraining
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.initialize import InitialA, Initialization, form_initial_a
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.sampling import sample_cohort
from sfedlora.federation.server_optimizer import ServerOptimizer
from sfedlora.federation.state import POOLED_ID, Federation, RoundSettings
from sfedlora.lora.base_model import BaseModel, load_base_model
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.limits import input_limits
from sfedlora.lora.scaling import effective_clients, scaling_factor
from sfedlora.methods import FlexLoRA, Method, client_weights, make_method
from sfedlora.methods.flexlora import require_rank
from sfedlora.seeds import derive_seed
from sfedlora.types import Part, select_parts

__all__ = ["Prepared", "encode_examples", "load_source", "prepare"]

MAX_EVALUATED = 100
TOLERATED_COUNT_ERROR = 0.2
ADAPTIVE, ADAPTIVE_LEARNING_RATE = ("fedadam", "fedyogi"), 0.01
"""Server optimizers whose step is about the learning rate itself, and what `auto` gives them."""


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
    method = make_method(config.method.name, config.method.head)
    examples = load_source(config, config.data.source)
    label_names = _label_names(config, examples)
    device = _resolve_device(config.device)
    base = load_base_model(
        config.model.source,
        task=config.model.task,
        dtype=config.model.dtype,
        device=str(device),
        num_labels=len(label_names) or None,
        label_names=label_names or None,
        seed=derive_seed(config.seed, "new_weights"),
    )
    data = encode_examples(config, examples, base, label_names)
    splits = _partition(config, examples, data)
    resident = adapt(
        base.model,
        target_modules=config.lora.target_modules,
        rank=config.lora.rank,
        dropout=config.lora.dropout,
        head_modules=base.new_modules,
    )
    if isinstance(method, FlexLoRA):
        require_rank(resident.layout, config.lora.rank)
    if config.model.gradient_checkpointing:
        resident.enable_gradient_checkpointing()
    resolved = _resolve(config, base, method, device, len(splits))
    initial = _initial_a(resolved, method, splits, resident)
    scaling_clients = _scaling_clients(resolved, initial, len(splits))
    external = _external(resolved)
    encoded = {split: encode_examples(resolved, rows, base, label_names) for split, rows in external.items()}
    federation = _federation(resolved, method, data, splits, resident, base, initial, scaling_clients, encoded)
    return Prepared(
        resolved,
        federation,
        base,
        label_names,
        scaling_clients,
        _partition_record(examples, splits),
        _environment(resolved, base, initial, scaling_clients, federation.scaling)
        | {"external_sha256": {split: rows.sha256 for split, rows in external.items()}},
    )


def load_source(config: RunConfig, source: str) -> Examples:
    """The rows of a source, with the run's subset and hub split where they apply."""
    is_main = source == config.data.source
    return load_examples(source, subset=config.data.subset if is_main else None, split=config.data.hub_split)


def encode_examples(config: RunConfig, examples: Examples, base: BaseModel, label_names: Sequence[str]) -> EncodedData:
    """Token ids of the rows, by the run's task, columns and template.

    Raises:
        DataError: a column or a row cannot be used.
        ConfigError: rows are longer than the model can read, or their ids are not the model's.
    """
    encoded = _encode(config, examples, base.tokenizer, label_names)
    limits = input_limits(base.model)
    longest = int(encoded.lengths.max())
    if limits.max_tokens is not None and longest > limits.max_tokens:
        raise ConfigError(
            f"data.max_length: {config.data.max_length} lets an example of {longest} tokens through, but "
            f"{config.model.source} reads at most {limits.max_tokens}; lower data.max_length"
        )
    if int(encoded.tokens.max()) >= limits.num_embeddings:
        raise ConfigError(
            f"model.source: the tokenizer of {config.model.source} gives token id {int(encoded.tokens.max())}, but the "
            f"model has {limits.num_embeddings} embeddings; the tokenizer belongs to another model"
        )
    return encoded


def _encode(
    config: RunConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str]
) -> EncodedData:
    if config.model.task == "causal-lm":
        return encode_causal(
            examples,
            tokenizer,
            prompt=_role(config, "prompt"),
            response=_required_role(config, "response"),
            template=config.data.template,
            loss_on=config.data.loss_on,
            max_length=config.data.max_length,
        )
    encoded, _ = encode_classification(
        examples,
        tokenizer,
        text=_required_role(config, "text"),
        text_pair=_role(config, "text_pair"),
        label=_required_role(config, "label"),
        labels=label_names,
        max_length=config.data.max_length,
    )
    return encoded


def _role(config: RunConfig, role: str) -> str | None:
    """The column that plays a role: the configured one, else the column of the role's own name."""
    return config.data.columns.get(role, None if role == "text_pair" else role)


def _required_role(config: RunConfig, role: str) -> str:
    column = _role(config, role)
    if column is None:
        raise ConfigError(f"data.columns.{role}: null, but task {config.model.task} needs this column; name it")
    return column


def _label_names(config: RunConfig, examples: Examples) -> tuple[str, ...]:
    if config.model.task == "causal-lm":
        return ()
    column = _required_role(config, "label")
    names = config.data.labels if config.data.labels is not None else examples.class_names.get(column)
    _, label_names = number_labels(examples.column(column), names, where=f"{examples.source}, column {column!r}")
    return label_names


def _resolve_device(device: str) -> torch.device:
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


def _resolve(config: RunConfig, base: BaseModel, method: Method, device: torch.device, num_clients: int) -> RunConfig:
    """The configuration with every `auto` replaced by what the run uses."""
    init = config.lora.init
    if init == "auto":
        init = "independent" if config.lora.scaling == "sfed" else "shared"
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
            "lora.init": init,
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


def _partition(config: RunConfig, examples: Examples, data: EncodedData) -> dict[str, ClientSplit]:
    section = config.partition
    values: Sequence[Any] | None = None
    if section.column is not None:
        values = examples.column(section.column)
    elif section.scheme in ("dirichlet", "shards"):
        if data.labels is None:
            raise ConfigError(
                f"partition.scheme: {section.scheme!r} deals by class; task {config.model.task} has no labels, "
                "so name a column in partition.column"
            )
        values = data.labels.tolist()
    groups = examples.column(config.data.group) if config.data.group is not None else None
    assigned = assign_clients(
        scheme=section.scheme,
        num_rows=len(data),
        num_clients=section.num_clients,
        labels_or_column=values,
        concentration=0.5 if section.concentration is None else section.concentration,
        min_examples=section.min_examples,
        seed=derive_seed(config.seed, "partition"),
        groups=groups,
    )
    return {
        client_id: split_client(
            assigned[client_id], fractions=config.data.split, client_id=client_id, seed=config.seed, groups=groups
        )
        for client_id in sorted(assigned)
    }


def _initial_a(
    config: RunConfig, method: Method, splits: Mapping[str, ClientSplit], resident: ResidentModel
) -> InitialA:
    """A before round 1. Methods that average nothing at the start get one draw (and `local` clients their own)."""
    weights = _averaging_weights(config, splits)
    init: Initialization = _chosen_init(config) if method.averages_a else "shared"
    initial = form_initial_a(resident.layout, config.lora.rank, weights=weights, init=init, seed=config.seed)
    measured = initial.measured_clients
    if measured is not None and init in ("independent", "local"):
        intended = effective_clients(list(weights.values()))
        if abs(measured / intended - 1.0) > TOLERATED_COUNT_ERROR:
            warnings.warn(
                f"the draws behave like {measured:.2f} effective clients, {intended:.2f} were intended; "
                "the adapters are small or the draws are not independent",
                stacklevel=2,
            )
    return initial


def _averaging_weights(config: RunConfig, splits: Mapping[str, ClientSplit]) -> dict[str, float]:
    """Weights of the average that formed A: over all clients, for `local` over the cohort of round 1."""
    members: Sequence[str] = sorted(splits)
    if config.lora.init == "local":
        members = sample_cohort(members, config.rounds.cohort_size, seed=config.seed, round_num=1)
    counts = {client_id: len(splits[client_id].train) for client_id in members}
    return client_weights(counts, config.rounds.weighting)


def _chosen_init(config: RunConfig) -> Initialization:
    if config.lora.init == "auto":
        raise ConfigError("lora.init: auto was not resolved")
    return config.lora.init


def _scaling_clients(config: RunConfig, initial: InitialA, num_clients: int) -> float:
    """The N of the sfed rule; warns where sfed over-amplifies or is rslora in disguise."""
    chosen = config.lora.num_clients
    count = initial.effective_clients if chosen == "effective" else float(num_clients if chosen == "total" else chosen)
    if config.lora.scaling != "sfed" or initial.effective_clients > 1.0 or num_clients == 1:
        return count
    formed = f"lora.init: {config.lora.init}, method {config.method.name}: A is not the average of independent draws"
    if count > 1.0:
        warnings.warn(
            f"{formed}, so its variance is not divided by N and scaling sfed with N = {count:g} makes gamma "
            f"sqrt({count:g}) times too large; use lora.init: independent or lora.num_clients: effective",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"{formed}, so the effective number of clients is 1 and scaling sfed equals rslora here; "
            "use lora.init: independent for SFed-LoRA",
            stacklevel=2,
        )
    return count


def _federation(  # noqa: PLR0917 - the parts of a federation, each made by a function above
    config: RunConfig,
    method: Method,
    data: EncodedData,
    splits: Mapping[str, ClientSplit],
    resident: ResidentModel,
    base: BaseModel,
    initial: InitialA,
    scaling_clients: float,
    external: Mapping[str, EncodedData],
) -> Federation:
    local, rounds = config.local, config.rounds
    participants: dict[str, Sequence[int]] = {client_id: split.train for client_id, split in splits.items()}
    local_steps = local.local_steps
    if method.pools_data:
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
    )
    pad_token_id = base.tokenizer.pad_token_id
    if not isinstance(pad_token_id, int):
        raise ConfigError(f"model.source: {config.model.source} has no pad token")
    return Federation(
        resident=resident,
        runner=SerialRunner(resident, data, training, config.model.task, pad_token_id, config.seed),
        method=method,
        data=data,
        splits=splits,
        participants=participants,
        external=external,
        initial=_initial_adapter(resident, initial),
        init=_chosen_init(config) if method.averages_a or Part.A in method.personal_parts() else "shared",
        scaling=scaling_factor(
            config.lora.scaling, alpha=config.lora.alpha, rank=config.lora.rank, num_clients=scaling_clients
        ),
        effective_clients=initial.effective_clients,
        task=config.model.task,
        pad_token_id=pad_token_id,
        batching=EvalBatching(config.evaluation.batch_size, config.evaluation.max_batch_tokens),
        rounds=RoundSettings(
            num_rounds=rounds.num_rounds,
            cohort_size=None if method.pools_data else rounds.cohort_size,
            weighting=rounds.weighting,
            learning_rate=local.learning_rate,
            schedule=local.schedule,
            warmup_rounds=local.warmup_rounds,
            evaluate_every=config.evaluation.every,
            evaluated=_evaluated(config),
            server_optimizer=_server_optimizer(config),
        ),
        seed=config.seed,
    )


def _initial_adapter(resident: ResidentModel, initial: InitialA) -> dict[str, Tensor]:
    """A as formed, B zero, the head as the model has it now."""
    before = resident.read()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in select_parts(before, [Part.B]).items()}
    return {**before, **initial.tensors, **zeros}


def _external(config: RunConfig) -> dict[str, Examples]:
    """The rows of the further validation and test files, where there are some."""
    sources = {"validation": config.data.validation, "test": config.data.test}
    return {split: load_source(config, source) for split, source in sources.items() if source is not None}


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


def _evaluated(config: RunConfig) -> Literal["all", "cohort"] | int:
    clients = config.evaluation.clients
    if clients == "auto":
        raise ConfigError("evaluation.clients: auto was not resolved")
    return clients


def _partition_record(examples: Examples, splits: Mapping[str, ClientSplit]) -> dict[str, Any]:
    """Rows of the source, from 0 in file order; example i of the encoded data is row i."""
    clients = {
        client_id: {
            "dir": safe_directory_name(client_id),
            "train": list(split.train),
            "validation": list(split.validation),
            "test": list(split.test),
        }
        for client_id, split in splits.items()
    }
    return {"source_sha256": examples.sha256, "clients": clients}


def _environment(
    config: RunConfig, base: BaseModel, initial: InitialA, scaling_clients: float, scaling: float
) -> dict[str, Any]:
    packages = ("sfedlora", "torch", "transformers", "peft", "safetensors", "datasets", "tokenizers", "numpy")
    return {
        "schema_version": 1,
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "platform": platform.platform(),
        "device": config.device,
        "threads": config.threads,
        "seed": config.seed,
        "base_model": {
            "source": config.model.source,
            "loads_from": base.name_or_path,
            "sha256": base.sha256,
            "dtype": base.dtype,
            "trained_in_full": list(base.new_modules),
        },
        "scaling": {
            "rule": config.lora.scaling,
            "gamma": scaling,
            "num_clients": scaling_clients,
            "effective_clients": initial.effective_clients,
            "measured_effective_clients": initial.measured_clients,
        },
    }
