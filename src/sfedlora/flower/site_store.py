"""What a site keeps between rounds: its B, its head and its optimizer moments, by the round that made them.

    <state directory>/<federation>/<client>/round-000003/{state.json, personal.safetensors, optimizer.safetensors}

Only its owner can read it. The server says which rounds are still needed: the last one that it accepted, and the best.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import StorageError
from sfedlora.privacy.noise import KEY_BYTES, random_key
from sfedlora.storage import (
    add_file,
    directory_written_whole,
    make_directory,
    read_record,
    read_tensors,
    remove_directory,
    remove_leftovers,
    to_json,
    to_safetensors,
    write_bytes,
)
from sfedlora.types import Tensors

__all__ = ["SiteStore"]

_ROUND_FOLDER = re.compile(r"round-([0-9]{6,9})")
_FILES = ("personal", "optimizer")


@dataclass(frozen=True)
class SiteStore:
    """The state of one site in one federation.

    Attributes:
        path: its folder.
    """

    path: Path

    @classmethod
    def at(cls, state_dir: Path, federation_id: str, client_id: str) -> SiteStore:
        """The store of a client; its folders are made, for their owner only.

        Raises:
            StorageError: they cannot be made.
        """
        path = state_dir / safe_directory_name(federation_id) / safe_directory_name(client_id)
        for folder in (path.parent, path):
            make_directory(folder)
            if folder.is_symlink():
                raise StorageError(f"{folder}: a link; expected a folder, in which only its owner can write")
            try:
                folder.chmod(0o700)
            except OSError as error:
                reason = f"cannot be kept from other users ({error.strerror}); use a folder of your own"
                raise StorageError(f"{folder}: {reason}") from None
        return cls(path)

    def rounds(self) -> list[int]:
        """The rounds whose state is here, oldest first."""
        matches = (_ROUND_FOLDER.fullmatch(folder.name) for folder in self.path.glob("round-*"))
        return sorted(int(match[1]) for match in matches if match is not None)

    def save(self, round_num: int, personal: Tensors, optimizer: Tensors) -> None:
        """Keep the state after a round; what was kept for the same round goes.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        contents = {"personal": to_safetensors(personal), "optimizer": to_safetensors(optimizer)}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        files = {f"{name}.safetensors": content for name, content in contents.items()}
        files["state.json"] = to_json({"round_num": round_num, "sha256": digests}).encode()
        with directory_written_whole(self._folder(round_num), private=True) as folder:
            for name, content in files.items():
                add_file(folder / name, content, private=True)

    def load(self, round_num: int) -> tuple[Tensors, Tensors]:
        """The personal factors and the optimizer moments after a round.

        Raises:
            StorageError: a file is missing, damaged or of another round.
        """
        folder = self._folder(round_num)
        facts = read_record(folder / "state.json", {"round_num": int, **{f"sha256.{name}": str for name in _FILES}})
        if facts["round_num"] != round_num:
            raise StorageError(f"{folder}: holds the state after round {facts['round_num']}; put the original back")
        for name in _FILES:
            path = folder / f"{name}.safetensors"
            try:
                content = path.read_bytes()
            except OSError as error:
                raise StorageError(f"{path}: cannot be read ({error.strerror}); put the original file back") from None
            if hashlib.sha256(content).hexdigest() != facts["sha256"][name]:
                raise StorageError(f"{path}: damaged: its content is not what was written; put the original file back")
        return read_tensors(folder / "personal.safetensors"), read_tensors(folder / "optimizer.safetensors")

    def keep(self, round_nums: Collection[int]) -> None:
        """Remove the rounds before the last of these that are not among them.

        Later ones stay: the answer to an old message, late or sent again, takes nothing from the rounds after it.
        """
        for round_num in self.rounds():
            if round_num < max(round_nums, default=0) and round_num not in round_nums:
                remove_directory(self._folder(round_num))

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written or half removed."""
        remove_leftovers(self.path)

    def secret_key(self) -> bytes:
        """The key of the noise that this site adds; drawn once, never sent.

        Raises:
            StorageError: it cannot be written, or is damaged.
        """
        path = self.path / "noise.key"
        if not path.is_file():
            write_bytes(path, random_key(), private=True)
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise StorageError(f"{path}: {len(key)} bytes, expected {KEY_BYTES}; remove it for a new key")
        return key

    def _folder(self, round_num: int) -> Path:
        return self.path / f"round-{round_num:06d}"
