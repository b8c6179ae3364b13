"""What can be done with a run directory: evaluate a split or a file, export adapters and merged models."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel

from sfedlora.artifacts import RunDirectory
from sfedlora.errors import ConfigError, InputError, StorageError
from sfedlora.experiment import load_state, write_adapter
from sfedlora.federation.evaluate import mean_results
from sfedlora.federation.round import Split, evaluate_clients, evaluate_external
from sfedlora.lora.base_model import load_base_model
from sfedlora.setup import encode_examples, load_source
from sfedlora.storage import directory_written_whole, sync_files

__all__ = ["RoundChoice", "evaluate_file", "evaluate_run", "export_adapters", "export_merged"]

RoundChoice = Literal["last", "best"] | int


def evaluate_run(
    run_dir: Path, *, split: Split, round_choice: RoundChoice = "last", clients: Sequence[str] | None = None
) -> dict[str, Any]:
    """Metrics of each client with its own adapter on a split of its own data.

    Args:
        run_dir: a run directory with at least one checkpoint.
        split: train, validation or test.
        round_choice: last, best, or the number of a kept round.
        clients: which clients; None: the ones that the run evaluates.

    Returns:
        `{"round_num", "split", "weighted", "unweighted", "clients": {id: metrics}}`.

    Raises:
        InputError: no such round or client, or data or model have changed since.
    """
    prepared, state = load_state(run_dir, _round_number(run_dir, round_choice))
    federation = prepared.federation
    if clients is not None:
        _require_clients(clients, federation.splits)
        chosen = {client_id: federation.splits[client_id] for client_id in clients}
        federation = replace(federation, splits=chosen, rounds=replace(federation.rounds, evaluated="all"))
    evaluated = evaluate_clients(federation, state, split, sorted(federation.splits))
    results = {client_id: result for client_id, _, result in evaluated}
    return {
        "round_num": state.server.round_num,
        "split": split,
        "weighted": mean_results(results, weighted=True),
        "unweighted": mean_results(results, weighted=False),
        "clients": {key: {"num_examples": r.num_examples, **r.metrics()} for key, r in results.items()},
    }


def evaluate_file(
    run_dir: Path, source: str, *, round_choice: RoundChoice = "last", clients: Sequence[str] | None = None
) -> dict[str, Any]:
    """Mean metrics of the clients' adapters on one further file with the run's columns; see `evaluate_run`."""
    prepared, state = load_state(run_dir, _round_number(run_dir, round_choice))
    chosen = sorted(prepared.federation.splits) if clients is None else list(clients)
    _require_clients(chosen, prepared.federation.splits)
    examples = load_source(prepared.config, source)
    encoded = encode_examples(prepared.config, examples, prepared.base, prepared.label_names)
    federation = replace(prepared.federation, external={"test": encoded})
    means = evaluate_external(federation, state, chosen, "test")["external_test"]
    return {"round_num": state.server.round_num, "data": source, "num_examples": len(encoded), "unweighted": means}


def export_adapters(
    run_dir: Path, target: Path, *, round_choice: RoundChoice = "last", clients: Sequence[str] | None = None
) -> list[Path]:
    """Write one stock PEFT directory per client that took part, and the shared part, under `target`.

    Raises:
        InputError: no such round or client, or the target is not empty.
    """
    _require_empty(target)
    prepared, state = load_state(run_dir, _round_number(run_dir, round_choice))
    available = sorted(state.personal)
    chosen = available if clients is None else list(clients)
    _require_clients(chosen, [*prepared.federation.splits, *state.personal])
    written = [target / "shared"] if clients is None else []
    if clients is None:
        write_adapter(prepared, state, None, target / "shared")
    layout = RunDirectory(target)
    for client_id in chosen:
        folder = target / layout.adapter_path(client_id).name
        write_adapter(prepared, state, client_id, folder)
        written.append(folder)
    return written


def export_merged(run_dir: Path, target: Path, *, client: str | None, round_choice: RoundChoice = "last") -> Path:
    """Write one client's model (None: the shared part) with the adapter merged into the base, and the tokenizer.

    The merge is stock PEFT's `merge_and_unload` in float32, because a merge into bfloat16 weights rounds the adapter.

    Raises:
        InputError: as `export_adapters`.
        StorageError: it cannot be written; nothing stays behind.
    """
    _require_empty(target)
    prepared, state = load_state(run_dir, _round_number(run_dir, round_choice))
    if client is not None:
        _require_clients([client], [*prepared.federation.splits, *state.personal])
    names = prepared.label_names
    base = load_base_model(
        prepared.config.model.source,
        task=prepared.config.model.task,
        dtype="float32",
        num_labels=len(names) or None,
        label_names=names or None,
    )
    with directory_written_whole(target.resolve()) as folder:
        adapter = folder / ".adapter"
        write_adapter(prepared, state, client, adapter)
        merged = PeftModel.from_pretrained(base.model, adapter).merge_and_unload()
        shutil.rmtree(adapter)
        try:
            merged.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
        except Exception as error:  # a full disk: safetensors has its own error, tokenizers raises a bare Exception
            raise StorageError(f"{target}: cannot be written ({error}); free space or permissions?") from None
        sync_files(folder)
    return target


def _round_number(run_dir: Path, choice: RoundChoice) -> int | None:
    if choice == "last":
        return None
    if choice == "best":
        summary = RunDirectory.open(run_dir).summary()
        if not summary:
            raise InputError(f"{run_dir}: the best round is known when the run has finished; use --round last")
        return int(summary["best"]["round_num"])
    return choice


def _require_clients(clients: Sequence[str], known: Collection[str]) -> None:
    for client_id in clients:
        if client_id not in known:
            raise InputError(f"no client {client_id!r} in this run; clients are {', '.join(sorted({*known}))}")


def _require_empty(target: Path) -> None:
    try:
        taken = any(target.iterdir()) if target.is_dir() else target.exists() or target.is_symlink()
    except OSError as error:
        raise ConfigError(f"{target}: cannot be used ({error.strerror}); choose another folder") from None
    if taken:
        raise ConfigError(f"{target}: already exists and is not empty; choose another folder")
