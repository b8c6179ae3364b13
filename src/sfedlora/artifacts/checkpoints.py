"""Checkpoints: the state after a round, complete or absent.

    round-000003/state.json           the round, and small facts
    round-000003/server.safetensors   the server's state
    round-000003/clients.json         which file of `personal/` and `optimizer/` holds each client
    round-000003/checksums.sha256       of the other three

A round writes only the clients that it changed; its checkpoint refers to older files for the others. First those files
are on the disk, then the folder that refers to them appears. The last two rounds are kept, and the best one; a client
file goes when no kept round refers to it.

Not here: what is done about a damaged checkpoint (`recovery`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sfedlora.artifacts.checksums import FORMAT_VERSION, add_checksummed_files, require_checksums
from sfedlora.artifacts.client_files import ClientFile, ClientFiles, check_files, path_of, verify_files, with_written
from sfedlora.artifacts.partial import remove_partial
from sfedlora.errors import StorageError
from sfedlora.federation.state import FederationState
from sfedlora.storage import (
    directory_written_whole,
    make_directory,
    read_record,
    read_tensors,
    remove_directory,
    remove_file,
    remove_leftovers,
    to_json,
    to_safetensors,
)
from sfedlora.types import ServerState, Tensors

__all__ = ["Checkpoint", "CheckpointWriter", "Checkpoints"]

_SHARED, _EXTRA = "shared/", "extra/"
_ROUND_FOLDER = re.compile(r"round-([0-9]{6,9})")
_STATE: dict[str, Any] = {"round_num": int}
_STATE |= {f"progress.{name}": object for name in ("initial", "best_round", "best_loss")}
_PERSONAL, _OPTIMIZER = _KINDS = ("personal", "optimizer")
_STATE_FILE, _SERVER_FILE, _CLIENTS_FILE = _FILES = ("state.json", "server.safetensors", "clients.json")


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
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        path: their folder.
    """

    path: Path

    def rounds(self) -> list[int]:
        """Rounds that have a complete checkpoint, oldest first.

        Raises:
            StorageError: a name among the checkpoints that no run gives.
        """
        rounds = []
        for folder in self.path.glob("round-*"):
            matched = _ROUND_FOLDER.fullmatch(folder.name)
            if matched is None:
                raise StorageError(f"{folder}: no checkpoint; expected names such as round-000003; move it elsewhere")
            rounds.append(int(matched[1]))
        return sorted(rounds)

    def load(self, round_num: int) -> Checkpoint:
        """Read the state after a round; clients stay on disk until they are asked for.

        Raises:
            StorageError: a part is missing or damaged, or a client's file is not the one that belongs here.
        """
        folder = self.folder(round_num)
        content = read_record(folder / _STATE_FILE, _STATE)
        require_checksums(folder, content, _FILES)
        if content["round_num"] != round_num:
            raise StorageError(f"{folder}: holds the state after round {content['round_num']}; put the original back")
        server = read_tensors(folder / _SERVER_FILE)
        clients = self.clients(round_num)
        for files in clients.values():
            check_files(files)
        state = ServerState(round_num, _without_prefix(_SHARED, server), _without_prefix(_EXTRA, server))
        return Checkpoint(_on_disk(state, clients), content["progress"])

    def verify(self, round_num: int, verified: set[Path]) -> Checkpoint:
        """As `load`, and read the clients' files too.

        Args:
            round_num: the round.
            verified: clients' files that need not be read again; those that are read are added.

        Raises:
            StorageError: as `load`, or the content of a client's file is not what was written.
        """
        checkpoint = self.load(round_num)
        for files in self.clients(round_num).values():
            verify_files(files, verified)
        return checkpoint

    def clients(self, round_num: int | None) -> dict[str, ClientFiles]:
        """The clients' files, by kind, that a round's checkpoint refers to; None: no clients yet."""
        if round_num is None:
            return {kind: ClientFiles(self.path / kind) for kind in _KINDS}
        path = self.folder(round_num) / _CLIENTS_FILE
        content = read_record(path, dict.fromkeys(_KINDS, dict))
        return {kind: ClientFiles(self.path / kind, _index(content[kind], path)) for kind in _KINDS}

    def client_bytes(self) -> int:
        """Disk use of the clients' files."""
        return sum(path.stat().st_size for path in self._client_paths())

    def remove(self, round_num: int) -> None:
        """Remove a round's checkpoint; clients' files that only it referred to become leftovers."""
        remove_directory(self.folder(round_num))

    def remove_leftovers(self) -> None:
        """Remove what a killed process left: half-written files, and clients' files that no checkpoint refers to."""
        remove_leftovers(self.path)
        for folder in self.path.glob("*/"):
            remove_leftovers(folder)
        kept = [files for round_num in self.rounds() for files in self.clients(round_num).values()]
        referred = {path_of(files, client_id) for files in kept for client_id in files}
        for path in self._client_paths():
            if path not in referred:
                remove_file(path)
        for kind in _KINDS:  # earlier versions left them to the umask
            if (self.path / kind).is_dir():
                make_directory(self.path / kind, private=True)

    def folder(self, round_num: int) -> Path:
        """Where a round's checkpoint is."""
        return self.path / f"round-{round_num:06d}"

    def _client_paths(self) -> list[Path]:
        return [path for kind in _KINDS for path in (self.path / kind).glob("*/*.safetensors")]


class _Superseded(NamedTuple):
    """A client's file that is no longer the latest, and the rounds whose state it belongs to."""

    path: Path
    first_round: int
    last_round: int


class CheckpointWriter:
    """The one writer of a run's checkpoints. It knows which files older rounds still need, so it never looks for them.

    What is in the folder already, it goes on from.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        rounds = checkpoints.rounds()
        self._checkpoints = checkpoints
        self._clients = checkpoints.clients(rounds[-1] if rounds else None)
        self._entries = {kind: _entries(files.index, files) for kind, files in self._clients.items()}
        spans: dict[Path, _Superseded] = {}
        for round_num in rounds[:-1]:
            for kind, files in checkpoints.clients(round_num).items():
                for client_id, file in files.index.items():
                    if self._clients[kind].index.get(client_id) != file:
                        path = path_of(files, client_id)
                        spans[path] = _Superseded(path, file.round_num, round_num)
        self._superseded = list(spans.values())

    def save(self, checkpoint: Checkpoint, *, changed: Collection[str], best_round: int | None) -> FederationState:
        """Write the state after a round and drop what no kept round needs.

        Args:
            checkpoint: the state.
            changed: clients that are new or other than in the round saved before; only they are read from the state.
            best_round: a round whose checkpoint must stay.

        Returns:
            The state with its clients on disk.

        Raises:
            StorageError: the disk is full or cannot be written; the checkpoints before are intact.
        """
        state, before = checkpoint.state, self._clients
        round_num = state.server.round_num
        tensors = {_PERSONAL: state.personal, _OPTIMIZER: state.optimizer}
        after = {
            kind: with_written(
                before[kind], round_num, {key: tensors[kind][key] for key in changed if key in tensors[kind]}
            )
            for kind in _KINDS
        }
        for kind, files in after.items():
            self._entries[kind] |= _entries(changed, files)
        with directory_written_whole(self._checkpoints.folder(round_num)) as folder:
            _fill(folder, checkpoint, self._entries)
        self._clients = after
        for kind, files in before.items():
            for client_id in changed:
                old = files.index.get(client_id)
                if old is not None and old.round_num < round_num and client_id in tensors[kind]:
                    self._superseded.append(_Superseded(path_of(files, client_id), old.round_num, round_num - 1))
        self.drop(best_round)
        remove_partial(self._checkpoints.path)
        return _on_disk(state.server, self._clients)

    def drop(self, best_round: int | None) -> None:
        """Remove the rounds that are not kept, then the clients' files that only they needed.

        `save` does that; whoever goes on from a process that was killed in between does it first.
        """
        rounds = self._checkpoints.rounds()
        kept = {*rounds[-2:], best_round}
        for round_num in rounds:
            if round_num not in kept:
                self._checkpoints.remove(round_num)
        needed = []
        for old in self._superseded:
            if any(old.first_round <= round_num <= old.last_round for round_num in kept if round_num is not None):
                needed.append(old)
            else:
                remove_file(old.path)
        self._superseded = needed


def _entries(client_ids: Iterable[str], files: ClientFiles) -> dict[str, str]:
    """The lines of some clients in clients.json. Kept from round to round, since to encode all of them takes longer."""
    return {
        client_id: f'{json.dumps(client_id)}: [{file.round_num}, "{file.digest}"]'
        for client_id in client_ids
        if (file := files.index.get(client_id)) is not None
    }


def _fill(folder: Path, checkpoint: Checkpoint, entries: Mapping[str, Mapping[str, str]]) -> None:
    """Write the files of one round's folder."""
    server = checkpoint.state.server
    tensors = _prefixed(_SHARED, server.shared) | _prefixed(_EXTRA, server.extra)
    facts = {"format_version": FORMAT_VERSION, "round_num": server.round_num, "progress": checkpoint.progress}
    index = ",\n".join(f'"{kind}": {{\n' + ",\n".join(lines.values()) + "\n}" for kind, lines in entries.items())
    content = {
        _SERVER_FILE: to_safetensors(tensors),
        _STATE_FILE: (to_json(facts, indent=2) + "\n").encode(),
        _CLIENTS_FILE: f"{{\n{index}\n}}\n".encode(),
    }
    add_checksummed_files(folder, content)


def _on_disk(server: ServerState, clients: Mapping[str, ClientFiles]) -> FederationState:
    return FederationState(server, clients[_PERSONAL], clients[_OPTIMIZER])


def _index(entries: Mapping[str, Any], path: Path) -> dict[str, ClientFile]:
    """The entries of one kind in clients.json, each `[round_num, digest]`."""
    index = {}
    for client_id, entry in entries.items():
        match entry:
            case [int(round_num), str(digest)]:
                index[client_id] = ClientFile(round_num, digest)
            case _:
                raise StorageError(
                    f"{path}: damaged or edited: client {client_id!r} has {entry!r}, expected a round and a digest; "
                    "put the original file back"
                )
    return index


def _prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
