"""A run directory of which one file is replaced. The first byte says which; the others are as they were written.

Its checkpoint is of format 1, without checksums, so that what is replaced reaches the parsers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fuzz.scratch import scratch_folder
from sfedlora.artifacts import Checkpoint, CheckpointWriter, RunDirectory, load_partial, newest_intact, save_partial
from sfedlora.errors import SfedLoraError
from sfedlora.federation.client import ClientOutcome, TrainMetrics
from sfedlora.federation.state import FederationState
from sfedlora.storage import read_tensors, write_json, write_text
from sfedlora.types import ServerState

FILES = {
    "s": "checkpoints/round-000001/state.json",
    "c": "checkpoints/round-000001/clients.json",
    "v": "checkpoints/round-000001/server.safetensors",
    "k": "checkpoints/round-000001/checksums.sha256",
    "p": "checkpoints/personal/000001/a.safetensors",
    "f": "checkpoints/partial/a.json",
    "t": "checkpoints/partial/a.safetensors",
    "m": "metrics.jsonl",
    "e": "environment.json",
    "n": "partition.json",
    "u": "summary.json",
}


def fuzz_one(data: bytes) -> None:
    """Only typed errors come out of anything that reads a run directory."""
    name = FILES.get(chr(data[0])) if data else None
    if name is None:
        return
    path = _directory().path / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data[1:])
    try:
        for read in _readers(_directory(), path):
            try:
                read()
            except SfedLoraError:
                continue
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


def _readers(directory: RunDirectory, path: Path) -> list[Callable[[], object]]:
    checkpoints = directory.checkpoints
    readers: list[Callable[[], object]] = [
        directory.check_usable,
        directory.metrics,
        lambda: directory.require_metrics_to(1),
        directory.partition,
        directory.summary,
        lambda: newest_intact(checkpoints),
        lambda: load_partial(checkpoints.path, 2),
        lambda: CheckpointWriter(checkpoints),
    ]
    return [*readers, lambda: read_tensors(path)] if path.suffix == ".safetensors" else readers


@cache
def _directory() -> RunDirectory:
    """A run directory with every kind of file."""
    directory = RunDirectory(scratch_folder() / "run")
    factors = {"b:x": torch.ones(2, 3)}
    state = FederationState(ServerState(1, {"a:x": torch.ones(3)}, {"fresh_full:x": torch.ones(2)}), {"a": factors}, {})
    progress = {"initial": {}, "best_round": 1, "best_loss": 0.5}
    CheckpointWriter(directory.checkpoints).save(Checkpoint(state, progress), changed=["a"], best_round=1)
    (directory.checkpoints.folder(1) / "checksums.sha256").unlink()
    write_json(directory.checkpoints.folder(1) / "state.json", {"round_num": 1, "progress": progress})
    outcome = ClientOutcome("a", 2, 3, factors, {"b/step": torch.ones(1)}, TrainMetrics(1.0, None, 0.5, 3, 0, 1))
    save_partial(directory.checkpoints.path, {"a": outcome})
    shutil.move(directory.checkpoints.path / "partial" / "checksums.sha256", scratch_folder() / "unused")
    partial = directory.checkpoints.path / "partial" / "a.json"
    write_text(partial, partial.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 1'))
    directory.append_metrics({"round_num": 1, "eval_loss": 0.5})
    scaling = {"gamma": 1.0}
    write_json(
        directory.path / "environment.json",
        {"base_model": {"sha256": ""}, "scaling": scaling, "external_sha256": {}, "format_version": 1},
    )
    write_json(directory.path / "partition.json", {"source_sha256": "", "clients": {}})
    means: dict[str, Any] = {split: {"weighted": {}, "unweighted": {}} for split in ("validation", "test")}
    last = {"round_num": 1, **means}
    directory.write_summary({"initial": means, "last": last, "best": last, "store_bytes": 1})
    return directory
