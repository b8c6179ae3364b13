"""A run directory: what is written where, and how a run is found again.

Layout (schema version 1):

    config.yaml environment.json partition.json metrics.jsonl summary.json
    adapters/shared/  adapters/clients/<dir>/
    checkpoints/round-000003/{state.json, server.safetensors, clients/<dir>.safetensors}
    checkpoints/partial/<dir>.{safetensors,json}   clients that finished a round which was interrupted

A checkpoint is complete or absent. The last two rounds are kept, and the best one. A client that did not change is a
hard link to its file in the checkpoint before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sfedlora.config import RunConfig
from sfedlora.data.partition import safe_directory_name
from sfedlora.errors import ConfigError, InputError, StorageError
from sfedlora.federation.client import ClientOutcome, TrainMetrics
from sfedlora.federation.state import FederationState
from sfedlora.storage import (
    append_line,
    directory_written_whole,
    read_record,
    read_records,
    read_tensors,
    to_json,
    write_json,
    write_tensors,
    write_text,
)
from sfedlora.types import ServerState, Tensors

__all__ = ["Checkpoint", "RunDirectory"]

_SHARED, _EXTRA, _PERSONAL, _OPTIMIZER = "shared/", "extra/", "personal/", "optimizer/"
_ROUND_FOLDER = re.compile(r"round-([0-9]{6,9})")
_SUMMARY: dict[str, Any] = {
    f"{when}.{split}.weighted": dict for when in ("initial", "last", "best") for split in ("validation", "test")
}
_SUMMARY |= {"last.round_num": int, "best.round_num": int}
_STATE: dict[str, Any] = {"round_num": int, "clients": dict}
_STATE |= {f"progress.{name}": object for name in ("initial", "best_round", "best_loss")}
_PARTIAL: dict[str, Any] = {"client_id": str, "round_num": int, "num_examples": int, "metrics": dict}
_PARTIAL |= {f"metrics.{field.name}": object for field in fields(TrainMetrics)}


@dataclass(frozen=True)
class Checkpoint:
    """A complete state after a round.

    Attributes:
        state: the federation's state.
        progress: small facts kept beside it: the initial evaluation and the best round so far.
    """

    state: FederationState
    progress: Mapping[str, Any]


@dataclass(frozen=True)
class RunDirectory:
    """The owner of one run's files."""

    path: Path

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, environment: Mapping[str, Any], partition: Mapping[str, Any]
    ) -> RunDirectory:
        """Make a new run directory with what is fixed before round 1; config.yaml last, since it marks a run.

        Raises:
            ConfigError: the path is a file or a folder that is not empty, or cannot be made.
            StorageError: a file cannot be written; nothing stays behind.
        """
        cls.check_free(path)
        existed = path.is_dir()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output: {path} cannot be made ({error.strerror}); choose another output") from None
        try:
            write_json(path / "environment.json", environment)
            write_json(path / "partition.json", partition)
            write_text(path / "config.yaml", config.dump())
        except StorageError:
            for left in path.iterdir():
                left.unlink()
            if not existed:
                path.rmdir()
            raise
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a path that holds something already or cannot be made, before any model is loaded.

        Raises:
            ConfigError: the path is a file, a folder that is not empty, or lies where nothing can be written.
        """
        try:
            occupied = path.is_dir() and any(path.iterdir())
            begins = next(
                folder for folder in (path, *path.absolute().parents) if folder.exists() or folder.is_symlink()
            )
        except OSError as error:
            raise ConfigError(f"output: {path} cannot be used ({error.strerror}); choose another output") from None
        if occupied:
            holds_run = (path / "config.yaml").is_file()
            advice = f"go on with `sfedlora resume {path}` or choose another output" if holds_run else "choose another"
            what = "another run" if holds_run else "other files"
            raise ConfigError(f"output: {path} already holds {what}; {advice}")
        if not begins.is_dir():
            raise ConfigError(f"output: {begins} is no folder, expected a new or empty one; choose another output")
        if not os.access(begins, os.W_OK | os.X_OK):
            raise ConfigError(f"output: {begins} cannot be written by this user; choose another output")

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory.

        Raises:
            InputError: it holds no run.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path}: no run directory (config.yaml is missing); give the folder that `run` wrote")
        return cls(path)

    def config(self) -> RunConfig:
        """The resolved configuration."""
        return RunConfig.load(self.path / "config.yaml")

    def partition(self) -> dict[str, Any]:
        """partition.json.

        Raises:
            StorageError: it is missing or damaged; so also for the other files here.
        """
        return read_record(self.path / "partition.json", {"source_sha256": str, "clients": dict})

    def environment(self) -> dict[str, Any]:
        """environment.json."""
        kinds = {"base_model.sha256": str, "scaling.gamma": int | float | dict, "external_sha256": dict}
        return read_record(self.path / "environment.json", kinds)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one round's line to metrics.jsonl."""
        append_line(self.path / "metrics.jsonl", to_json(record))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a torn last line (power loss while it was written) is left out.

        Raises:
            StorageError: a complete line is damaged.
        """
        path = self.path / "metrics.jsonl"
        return read_records(path, {"round_num": int}) if path.is_file() else []

    def drop_metrics_after(self, round_num: int) -> None:
        """Take back the lines of rounds that no checkpoint holds."""
        kept = [record for record in self.metrics() if record["round_num"] <= round_num]
        write_text(self.path / "metrics.jsonl", "".join(to_json(record) + "\n" for record in kept))

    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run is not finished."""
        path = self.path / "summary.json"
        return read_record(path, _SUMMARY) if path.is_file() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the mark of a finished run."""
        write_json(self.path / "summary.json", summary)

    def adapter_path(self, client_id: str | None) -> Path:
        """The PEFT directory of a client, or of the shared part for None."""
        if client_id is None:
            return self.path / "adapters" / "shared"
        return self.path / "adapters" / "clients" / safe_directory_name(client_id)

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written: temporary files, and adapters of an unfinished run."""
        for path in [*self.path.glob(".*.tmp"), *self.path.glob("checkpoints/.*.tmp")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if not self.summary():
            shutil.rmtree(self.path / "adapters", ignore_errors=True)

    # checkpoints

    def rounds_kept(self) -> list[int]:
        """Rounds that have a complete checkpoint, oldest first.

        Raises:
            StorageError: a name among the checkpoints that no run gives.
        """
        rounds = []
        for folder in (self.path / "checkpoints").glob("round-*"):
            matched = _ROUND_FOLDER.fullmatch(folder.name)
            if matched is None:
                raise StorageError(f"{folder}: no checkpoint; expected names such as round-000003; move it elsewhere")
            rounds.append(int(matched[1]))
        return sorted(rounds)

    def save_checkpoint(self, checkpoint: Checkpoint, *, changed: Sequence[str], best_round: int | None) -> None:
        """Write the state after a round and drop the checkpoints that are no longer needed.

        Args:
            checkpoint: the state.
            changed: clients whose personal state is new in this round; the others are linked.
            best_round: a round whose checkpoint must stay.
        """
        server = checkpoint.state.server
        previous = self.rounds_kept()
        with directory_written_whole(self._checkpoint_path(server.round_num)) as folder:
            (folder / "clients").mkdir()
            tensors = _prefixed(_SHARED, server.shared) | _prefixed(_EXTRA, server.extra)
            write_tensors(folder / "server.safetensors", tensors)
            for client_id in checkpoint.state.personal:
                name = f"{safe_directory_name(client_id)}.safetensors"
                old = self._checkpoint_path(previous[-1]) / "clients" / name if previous else None
                if client_id in changed or old is None or not _link(old, folder / "clients" / name):
                    write_tensors(folder / "clients" / name, _client_tensors(checkpoint.state, client_id))
            clients = {client_id: safe_directory_name(client_id) for client_id in checkpoint.state.personal}
            write_json(
                folder / "state.json",
                {"round_num": server.round_num, "clients": clients, "progress": checkpoint.progress},
            )
        keep = {*self.rounds_kept()[-2:], best_round}
        for round_num in self.rounds_kept():
            if round_num not in keep:
                shutil.rmtree(self._checkpoint_path(round_num), ignore_errors=True)
        shutil.rmtree(self._partial_path(), ignore_errors=True)

    def load_checkpoint(self, round_num: int) -> Checkpoint:
        """Read the state after a round.

        Raises:
            StorageError: a part is missing or damaged.
        """
        folder = self._checkpoint_path(round_num)
        content = read_record(folder / "state.json", _STATE)
        server = read_tensors(folder / "server.safetensors")
        personal, optimizer = {}, {}
        for client_id in content["clients"]:
            tensors = read_tensors(folder / "clients" / f"{safe_directory_name(client_id)}.safetensors")
            personal[client_id] = _without_prefix(_PERSONAL, tensors)
            moments = _without_prefix(_OPTIMIZER, tensors)
            if moments:
                optimizer[client_id] = moments
        state = ServerState(round_num, _without_prefix(_SHARED, server), _without_prefix(_EXTRA, server))
        return Checkpoint(FederationState(state, personal, optimizer), content["progress"])

    # clients of an interrupted round

    def save_partial(self, outcomes: Mapping[str, ClientOutcome]) -> None:
        """Keep the outcomes of the clients that had finished when a round was interrupted."""
        if not outcomes:
            return
        with directory_written_whole(self._partial_path()) as folder:
            for client_id, outcome in outcomes.items():
                name = safe_directory_name(client_id)
                tensors = _prefixed(_PERSONAL, outcome.tensors) | _prefixed(_OPTIMIZER, outcome.optimizer_state)
                write_tensors(folder / f"{name}.safetensors", tensors)
                facts = {
                    "client_id": client_id,
                    "round_num": outcome.round_num,
                    "num_examples": outcome.num_examples,
                    "metrics": asdict(outcome.metrics),
                }
                write_json(folder / f"{name}.json", facts)

    def load_partial(self, round_num: int) -> dict[str, ClientOutcome]:
        """Outcomes kept for an interrupted round; those of another round are ignored."""
        outcomes: dict[str, ClientOutcome] = {}
        for path in sorted(self._partial_path().glob("*.json")):
            facts = read_record(path, _PARTIAL)
            if facts["round_num"] != round_num:
                continue
            tensors = read_tensors(path.with_suffix(".safetensors"))
            outcomes[facts["client_id"]] = ClientOutcome(
                facts["client_id"],
                round_num,
                facts["num_examples"],
                _without_prefix(_PERSONAL, tensors),
                _without_prefix(_OPTIMIZER, tensors),
                TrainMetrics(**{field.name: facts["metrics"][field.name] for field in fields(TrainMetrics)}),
            )
        return outcomes

    def _checkpoint_path(self, round_num: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_num:06d}"

    def _partial_path(self) -> Path:
        return self.path / "checkpoints" / "partial"


def _client_tensors(state: FederationState, client_id: str) -> dict[str, Any]:
    moments = state.optimizer.get(client_id, {})
    return _prefixed(_PERSONAL, state.personal[client_id]) | _prefixed(_OPTIMIZER, moments)


def _prefixed(prefix: str, tensors: Tensors) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: Tensors) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
