"""A new client joins a finished federation: the shared A, a B of its own from zero, trained on its data alone.

Needs the run directory's settings and shared adapter, the base model and the new client's file; no other client's data
(but for a classification whose `data.labels` are not named: then the run's source tells the classes). Beside it, on the
same rows and with the same steps: LoRA of its own from its own draw of A (`local-only`), and the untouched model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sfedlora.artifacts import RunDirectory
from sfedlora.config import RunConfig
from sfedlora.data.encoded import EncodedData
from sfedlora.data.splits import ClientSplit, split_client
from sfedlora.errors import ConfigError, InputError
from sfedlora.federation.client import ClientWork, LocalTraining, TrainingSetup, train_client
from sfedlora.federation.evaluate import EvalBatching, evaluate_examples
from sfedlora.federation.initialize import draw_a
from sfedlora.lora.base_model import BaseModel
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.peft_format import load_adapter, save_adapter
from sfedlora.lora.scaling import scaling_factor
from sfedlora.methods import make_method
from sfedlora.setup import encode_examples, load_source
from sfedlora.setup.dataset import find_label_names
from sfedlora.setup.model import load_model
from sfedlora.setup.resolve import resolve_device
from sfedlora.storage import directory_written_whole, sync_files, write_json
from sfedlora.types import LoraSize, Part, Tensors, part_of, select_parts

__all__ = ["Personalized", "personalize"]


@dataclass(frozen=True)
class Personalized:
    """What a new client got.

    Attributes:
        adapter: its stock PEFT directory.
        num_examples: rows by split.
        num_steps: optimizer steps of each training.
        rows: `untouched`, `local-only`, `personalized` -> split -> metrics on the client's own held-out rows.
    """

    adapter: Path
    num_examples: Mapping[str, int]
    num_steps: int
    rows: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class _Joined:
    """The loaded model and the new client's rows."""

    config: RunConfig
    base: BaseModel
    resident: ResidentModel
    data: EncodedData
    split: ClientSplit
    client_id: str


def personalize(
    run_dir: Path,
    source: str,
    target: Path,
    *,
    client_id: str = "new",
    num_steps: int | None = None,
    learning_rate: float | None = None,
    train_a: bool = False,
) -> Personalized:
    """Train a new client's B on the shared A, compare, and write its adapter.

    Args:
        run_dir: a finished run whose method keeps B on its client.
        source: the new client's file, with the run's columns; it is split as `data.split` says.
        target: new folder for the PEFT directory; personalize.json lies in it, too.
        client_id: enters the seeds of its split and its batches.
        num_steps: optimizer steps; None: as many as a client takes in the whole run.
        learning_rate: of B; None: the run's.
        train_a: whether the shared A is trained further, on this client alone.

    Raises:
        InputError: the run is not finished, its method shares B, or the data cannot be used.
        ClientError: training gave no finite numbers.
        StorageError: the target cannot be written; nothing stays behind.
    """
    directory = RunDirectory.open(run_dir)
    config = directory.config()
    _require_usable(directory, config, target)
    joined = _join(config, source, client_id)
    shared = load_adapter(directory.adapter_path(None), layout=joined.resident.layout)
    size, rule, alpha = LoraSize(shared.rank, shared.scaling), config.lora.scaling, config.lora.alpha
    start = _start(joined, shared.tensors, shared.rank)
    steps = num_steps if num_steps is not None else _steps_of_run(config, len(joined.split.train))
    rate = learning_rate if learning_rate is not None else config.local.learning_rate

    def train(adapter: Tensors, own: LoraSize, parts: frozenset[Part]) -> dict[str, torch.Tensor]:
        setup = TrainingSetup(
            joined.resident, joined.data, _training(config, steps), config.model.task, _pad(joined), config.seed
        )
        trained = parts | ({Part.HEAD} if select_parts(adapter, [Part.HEAD]) else set())
        work = ClientWork(client_id, 1, adapter, frozenset(trained), own, rate, joined.split.train, {})
        return {**adapter, **train_client(setup, work).tensors}

    alone = LoraSize(shared.rank, scaling_factor(rule, alpha=alpha, rank=shared.rank, num_clients=1.0))
    own_a = draw_a(joined.resident.layout, shared.rank, seed=config.seed, owner=client_id)
    rows = {
        "untouched": _evaluate(joined, start, size),
        "local-only": _evaluate(joined, train({**start, **own_a}, alone, frozenset({Part.A, Part.B})), alone),
    }
    adapter = train(start, size, frozenset({Part.A, Part.B} if train_a else {Part.B}))
    rows["personalized"] = _evaluate(joined, adapter, size)
    counts = {name: len(own) for name, own in _rows(joined.split).items()}
    with directory_written_whole(target.resolve()) as folder:
        save_adapter(
            folder,
            adapter,
            layout=joined.resident.layout,
            rule="rslora",  # alpha of any number: gamma stays the shared adapter's
            alpha=shared.scaling * shared.rank**0.5,
            rank=shared.rank,
            dropout=config.lora.dropout,
            task=config.model.task,
            base_model_name=joined.base.name_or_path,
            target_suffixes=joined.resident.target_suffixes,
        )
        settings = {"run": str(run_dir), "data": source, "client_id": client_id, "trains_a": train_a}
        settings |= {"num_steps": steps, "learning_rate": rate, "num_examples": counts}
        write_json(folder / "personalize.json", {**settings, "metrics": rows})
        sync_files(folder)
    return Personalized(target, counts, steps, rows)


def _require_usable(directory: RunDirectory, config: RunConfig, target: Path) -> None:
    if Part.B not in make_method(config.method.name, config.method.head).personal_parts():
        raise ConfigError(
            f"{directory.path}: method {config.method.name!r} shares B as well, so a new client has nothing of its "
            f"own to train; serve {directory.adapter_path(None)} as it is. B per client: fedsa and its presets"
        )
    if not directory.summary():
        raise InputError(f"{directory.path}: not finished; go on with `sfedlora resume {directory.path}` first")
    if target.exists():
        raise ConfigError(f"{target}: already exists; choose a new folder")


def _join(config: RunConfig, source: str, client_id: str) -> _Joined:
    """Load the model and the client's rows as the run did."""
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    examples = load_source(config, source)
    names = _label_names(config)
    base = load_model(config, device, names)
    data = encode_examples(config, examples, base, names)
    groups = examples.column(config.data.group) if config.data.group is not None else None
    split = split_client(
        range(len(data)), fractions=config.data.split, client_id=client_id, seed=config.seed, groups=groups
    )
    rank = config.lora.rank
    resident = adapt(
        base.model,
        target_modules=config.lora.target_modules,
        rank=rank if isinstance(rank, int) else max(rank),
        dropout=config.lora.dropout,
        head_modules=base.new_modules,
    )
    return _Joined(config, base, resident, data, split, client_id)


def _label_names(config: RunConfig) -> tuple[str, ...]:
    """The classes of the run, which a new client may not have all of."""
    if config.model.task == "causal-lm":
        return ()
    if config.data.labels is not None:
        return tuple(str(label) for label in config.data.labels)
    return find_label_names(config, load_source(config, config.data.source))


def _start(joined: _Joined, shared: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """The shared factors, B zero, and the head as the run began with where it is personal."""
    joined.resident.resize(rank)
    start = {**joined.resident.read(), **shared}
    return {name: torch.zeros_like(value) if part_of(name) is Part.B else value for name, value in start.items()}


def _steps_of_run(config: RunConfig, num_examples: int) -> int:
    local = config.local
    per_round = local.local_steps
    if per_round is None:
        per_round = (local.local_epochs or 1) * -(-num_examples // (local.batch_size * local.accumulation))
    return per_round * config.rounds.num_rounds


def _training(config: RunConfig, num_steps: int) -> LocalTraining:
    local = config.local
    return LocalTraining(
        optimizer=local.optimizer,
        learning_rate_a_ratio=local.learning_rate_a_ratio,
        weight_decay=local.weight_decay,
        batch_size=local.batch_size,
        accumulation=local.accumulation,
        local_steps=num_steps,
        local_epochs=None,
        max_grad_norm=local.max_grad_norm,
        keep_optimizer_state=False,
    )


def _evaluate(joined: _Joined, adapter: Tensors, size: LoraSize) -> dict[str, dict[str, float]]:
    joined.resident.serve(adapter, size=size, base_deltas={})
    section = joined.config.evaluation
    held_out = {name: rows for name, rows in _rows(joined.split).items() if name != "train"}
    results = evaluate_examples(
        joined.resident,
        joined.data,
        list(held_out.values()),
        task=joined.config.model.task,
        batching=EvalBatching(section.batch_size, section.max_batch_tokens),
        pad_token_id=_pad(joined),
    )
    return {name: result.metrics() for name, result in zip(held_out, results, strict=True)}


def _rows(split: ClientSplit) -> dict[str, tuple[int, ...]]:
    return {"train": split.train, "validation": split.validation, "test": split.test}


def _pad(joined: _Joined) -> int:
    pad = joined.base.tokenizer.pad_token_id
    if not isinstance(pad, int):
        raise ConfigError(f"model.source: {joined.config.model.source} has no pad token")
    return pad
