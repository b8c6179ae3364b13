"""Outcomes of the clients that had finished a round when it was interrupted; the resumed round takes them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sfedlora.artifacts.checksums import FORMAT_VERSION, add_checksummed_files, require_checksums
from sfedlora.data.directories import safe_directory_name
from sfedlora.federation.client import ClientOutcome, TrainMetrics
from sfedlora.storage import (
    directory_written_whole,
    read_record,
    read_tensors,
    remove_directory,
    to_json,
    to_safetensors,
)

__all__ = ["load_partial", "remove_partial", "save_partial"]

_TENSORS, _MOMENTS = "personal/", "optimizer/"
_FACTS: dict[str, Any] = {"client_id": str, "round_num": int, "num_examples": int, "metrics": dict}
_FACTS |= {f"metrics.{field.name}": object for field in fields(TrainMetrics)}


def save_partial(checkpoints: Path, outcomes: Mapping[str, ClientOutcome]) -> None:
    """Keep the outcomes of an interrupted round, in place of those kept before; nothing happens without outcomes.

    Raises:
        StorageError: they cannot be written.
    """
    if not outcomes:
        return
    content: dict[str, bytes] = {}
    for client_id, outcome in outcomes.items():
        name = safe_directory_name(client_id)
        tensors = {_TENSORS + key: tensor for key, tensor in outcome.tensors.items()}
        moments = {_MOMENTS + key: tensor for key, tensor in outcome.optimizer_state.items()}
        content[f"{name}.safetensors"] = to_safetensors(tensors | moments)
        facts = {
            "format_version": FORMAT_VERSION,
            "client_id": client_id,
            "round_num": outcome.round_num,
            "num_examples": outcome.num_examples,
            "metrics": asdict(outcome.metrics),
        }
        content[f"{name}.json"] = (to_json(facts, indent=2) + "\n").encode()
    with directory_written_whole(_folder(checkpoints), private=True) as folder:
        add_checksummed_files(folder, content, private=True)


def load_partial(checkpoints: Path, round_num: int) -> dict[str, ClientOutcome]:
    """Outcomes kept for an interrupted round; those of another round are ignored.

    Raises:
        StorageError: a file is missing or damaged.
    """
    outcomes: dict[str, ClientOutcome] = {}
    folder = _folder(checkpoints)
    for path in sorted(folder.glob("*.json")):
        facts = read_record(path, _FACTS)
        require_checksums(folder, facts, (path.name, f"{path.stem}.safetensors"))
        if facts["round_num"] != round_num:
            continue
        tensors = read_tensors(path.with_suffix(".safetensors"))
        outcomes[facts["client_id"]] = ClientOutcome(
            facts["client_id"],
            round_num,
            facts["num_examples"],
            {key.removeprefix(_TENSORS): tensor for key, tensor in tensors.items() if key.startswith(_TENSORS)},
            {key.removeprefix(_MOMENTS): tensor for key, tensor in tensors.items() if key.startswith(_MOMENTS)},
            TrainMetrics(**{field.name: facts["metrics"][field.name] for field in fields(TrainMetrics)}),
        )
    return outcomes


def remove_partial(checkpoints: Path) -> None:
    """Remove the outcomes: their round is complete."""
    remove_directory(_folder(checkpoints))


def _folder(checkpoints: Path) -> Path:
    return checkpoints / "partial"
