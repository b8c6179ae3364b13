"""Every error that sfedlora raises on purpose, in one tree.

    SfedLoraError
    ├── InputError            the user gave something that cannot be used (CLI exit code 2)
    │   ├── ConfigError       a key, a value or a combination of values in the configuration
    │   ├── DataError         a data file, a column, a label, a partition
    │   ├── ModelError        a base model or its target modules
    │   └── AdapterError      an adapter directory or its tensors
    ├── RunError              a run that started and failed (CLI exit code 3)
    │   ├── ClientError       one client failed; carries client id, round and stage
    │   ├── UpdateError       an update that the server refuses; carries client id and tensor name
    │   └── StorageError      a file of the run directory could not be read or written
    └── Interrupted           stopped by the user after the client in hand (CLI exit code 130)

A message says what was given, what was expected and how to fix it.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "ClientError",
    "ConfigError",
    "DataError",
    "InputError",
    "Interrupted",
    "ModelError",
    "RunError",
    "SfedLoraError",
    "StorageError",
    "UpdateError",
]


class SfedLoraError(Exception):
    """Root of every error raised on purpose."""


class InputError(SfedLoraError):
    """Something the user gave cannot be used."""


class ConfigError(InputError):
    """A configuration key, value or combination is wrong."""


class DataError(InputError):
    """A data source, column, label or partition is wrong."""


class ModelError(InputError):
    """A base model or the choice of its target modules is wrong."""


class AdapterError(InputError):
    """An adapter directory does not fit what it should be loaded into."""


class RunError(SfedLoraError):
    """A run that started correctly has failed."""


class ClientError(RunError):
    """One client failed in one stage of one round."""

    def __init__(self, message: str, *, client_id: str, round_num: int, stage: str) -> None:
        super().__init__(f"client {client_id!r}, round {round_num}, {stage}: {message}")
        self.client_id = client_id
        self.round_num = round_num
        self.stage = stage
        self.reason = message


class UpdateError(RunError):
    """The server refuses an update; its state stays as it was."""

    def __init__(self, message: str, *, client_id: str, tensor: str | None = None) -> None:
        where = f"update of client {client_id!r}"
        if tensor is not None:
            where += f", tensor {tensor!r}"
        super().__init__(f"{where}: {message}")
        self.client_id = client_id
        self.tensor = tensor
        self.reason = message


class StorageError(RunError):
    """A file of the run directory could not be read or written."""


class Interrupted(SfedLoraError):  # noqa: N818 - an outcome the user asked for, not a fault
    """The user asked to stop; the run directory can be resumed."""
