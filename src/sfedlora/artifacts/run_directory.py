"""The owner of one run's files: what is fixed before round 1, metrics, summary, adapters.

Not here: checkpoints (`checkpoints`), outcomes of an interrupted round (`partial`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfedlora.artifacts.checkpoints import Checkpoints
from sfedlora.artifacts.checksums import FORMAT_VERSION, format_of
from sfedlora.config import RunConfig
from sfedlora.config.yaml_file import read_yaml
from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import ConfigError, InputError, StorageError
from sfedlora.storage import (
    OWNER_FILE,
    append_line,
    make_directory,
    owned,
    read_record,
    read_records,
    remove_leftovers,
    remove_tree,
    to_json,
    write_json,
    write_text,
)

__all__ = ["RunDirectory"]

_SUMMARY: dict[str, Any] = {
    f"{when}.{split}.weighted": dict for when in ("initial", "last", "best") for split in ("validation", "test")
}
_BEFORE_CONFIG = re.compile(r"\.owner|(environment|partition)\.json|\.[a-z]+\.(json|yaml)\.tmp")
_SUMMARY |= {"last.round_num": int, "best.round_num": int, "store_bytes": int}


@dataclass(frozen=True)
class RunDirectory:
    """The owner of one run's files."""

    path: Path

    @classmethod
    @contextmanager
    def created(
        cls, path: Path, config: RunConfig, environment: Mapping[str, Any], partition: Mapping[str, Any]
    ) -> Iterator[RunDirectory]:
        """Make a new run directory, owned until the block ends; config.yaml last, since it marks a run.

        Raises:
            ConfigError: the path is a file or a folder that is not empty, or cannot be made.
            InputError: another process works on it.
            StorageError: a file cannot be written; nothing stays behind.
        """
        cls.check_free(path)
        existed = path.is_dir()
        try:
            make_directory(path)
        except StorageError as error:
            raise ConfigError(f"output: {error}; or choose another output") from None
        try:
            with owned(path):
                cls.check_free(path)  # nobody else made a run here meanwhile
                directory = cls(path)
                directory._begin(config, environment, partition)
                yield directory
        except StorageError:
            if not existed and not any(path.iterdir()):
                remove_tree(path)
            raise

    def _begin(self, config: RunConfig, environment: Mapping[str, Any], partition: Mapping[str, Any]) -> None:
        try:
            self._remove_unborn()
            write_json(self.path / "environment.json", {"format_version": FORMAT_VERSION, **environment})
            write_json(self.path / "partition.json", partition)
            write_text(self.path / "config.yaml", config.dump())
        except StorageError:
            remove_tree(self.path / "config.yaml")
            self._remove_unborn()
            raise

    def _remove_unborn(self) -> None:
        """Remove what a process left that was killed before it had made a run of the folder."""
        for left in self.path.iterdir():
            if left.name != OWNER_FILE:
                remove_tree(left)

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a path that holds something already or cannot be made, before any model is loaded.

        Raises:
            ConfigError: the path is a file, a folder that is not empty, or lies where nothing can be written.
        """
        try:
            occupied = path.is_dir() and not _is_unborn(path)
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

    def check_usable(self) -> None:
        """Refuse what a state must not be read from or written to.

        Raises:
            InputError: it was written by a newer sfedlora, or holds a link, through which a write could leave it.
            StorageError: environment.json is damaged.
        """
        format_of(self.environment(), self.path / "environment.json")
        for folder, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                path = Path(folder, name)
                if path.is_symlink():
                    raise InputError(
                        f"{path}: is a link; a run directory holds none, because what is written through one lands "
                        "elsewhere: put the file or folder itself there"
                    )

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one process that writes to it, until the block ends.

        Raises:
            InputError: another process is.
        """
        with owned(self.path):
            yield

    def remove_stale_owner(self) -> None:
        """Remove the name of an owner that was killed when all but that was done; a living one keeps it."""
        if (self.path / OWNER_FILE).exists():
            with suppress(InputError, StorageError), self.owned():
                pass

    def config(self) -> RunConfig:
        """The resolved configuration."""
        return RunConfig.load(self.path / "config.yaml")

    def settings(self) -> Mapping[str, Any]:
        """The keys of config.yaml as they were written."""
        return read_yaml(self.path / "config.yaml").values

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

    def require_metrics_to(self, round_num: int) -> None:
        """Refuse to go on without the lines of the rounds behind.

        Raises:
            StorageError: a line of the rounds 1 to `round_num` is missing or is there twice.
        """
        found = [record["round_num"] for record in self.metrics()]
        if found != list(range(1, round_num + 1)):
            raise StorageError(
                f"{self.path / 'metrics.jsonl'}: damaged or edited: has the rounds {found}, expected 1 to {round_num}; "
                "put the original file back"
            )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the mark of a finished run."""
        write_json(self.path / "summary.json", summary)

    def adapter_path(self, client_id: str | None) -> Path:
        """The PEFT directory of a client, or of the shared part for None."""
        if client_id is None:
            return self.path / "adapters" / "shared"
        return self.path / "adapters" / "clients" / safe_directory_name(client_id)

    def make_client_adapters(self) -> None:
        """Make the folder of the clients' adapters, open to its owner alone."""
        make_directory(self.adapter_path("any").parent, private=True)

    @property
    def checkpoints(self) -> Checkpoints:
        """The states after rounds."""
        return Checkpoints(self.path / "checkpoints")

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written: temporary files, and adapters of an unfinished run."""
        remove_leftovers(self.path)
        self.checkpoints.remove_leftovers()
        if not self.summary():
            remove_tree(self.path / "adapters")


def _is_unborn(path: Path) -> bool:
    """Whether a folder is empty, or a process was killed before it had made a run of it."""
    names = [entry.name for entry in path.iterdir()]
    return not names or (OWNER_FILE in names and all(_BEFORE_CONFIG.fullmatch(name) for name in names))
