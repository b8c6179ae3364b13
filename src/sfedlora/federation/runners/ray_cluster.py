"""The Ray cluster that workers run on: one of this machine for as long as a run lasts, or one that exists.

Ray is imported when a cluster is asked for. It moves arguments and replies between the processes of a cluster by
pickle, and whoever can connect to a cluster can run code on it; so one that is started here listens on the loopback
interface only and asks for a token that nobody else has. Its settings are environment variables that Ray reads while
it is imported and started; they are set for that time only. A program that has imported Ray before gives them itself.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sfedlora.errors import ConfigError, RunError

__all__ = ["ADDRESS_VARIABLE", "Cluster", "WorkerResources", "ray_is_installed"]

ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Ray's own name for the cluster to use."""
CONNECT_SECONDS = 10.0
LONGEST_TEMPORARY = 30
"""Characters; Ray puts sockets below the temporary folder, whose paths must stay under 104."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning about what later versions do
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # dead workers are announced by us
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` it would copy the working directory
}
OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on these systems Ray uses the loopback interface; so on all
    "RAY_memory_monitor_refresh_ms": "0",  # it kills workers when others fill the memory; the system's own is enough
}


@dataclass(frozen=True)
class WorkerResources:
    """What a run asks Ray for.

    Attributes:
        num_workers: worker processes.
        num_cpus: CPU cores of each.
        num_gpus: GPUs of each.
    """

    num_workers: int
    num_cpus: int
    num_gpus: int


def ray_is_installed() -> bool:
    """Whether workers can be started here."""
    return importlib.util.find_spec("ray") is not None


class Cluster:
    """Owner of a connection to Ray, and of the cluster unless it was there before.

    Attributes:
        ray: the module.
    """

    def __init__(self, resources: WorkerResources) -> None:
        """Connect to what RAY_ADDRESS names, or start a cluster on this machine.

        Raises:
            ConfigError: Ray is not installed, no cluster answers, or it is too small.
            RunError: Ray could not be started.
        """
        if not ray_is_installed():
            raise ConfigError(
                f"workers: {resources.num_workers} workers need Ray, which is not installed; "
                "pip install 'sfedlora[ray]', or set workers: 1"
            )
        address = os.environ.get(ADDRESS_VARIABLE)
        self._directory: str | None = None
        self._connected_here = False
        self._sigterm = signal.getsignal(signal.SIGTERM)  # Ray replaces it
        with _quiet_start(own=not address):
            import ray

            self.ray: Any = ray
            try:
                if not ray.is_initialized():
                    self._connected_here = True
                    self._connect(address) if address else self._start(resources)
                self._require(resources)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Disconnect; a cluster that was started here ends with all its processes and files."""
        if self._connected_here:
            self.ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._sigterm)
        self._connected_here = False
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self, actor: Any) -> None:
        """End a worker for good."""
        if self.ray.is_initialized():
            self.ray.kill(actor, no_restart=True)

    def _connect(self, address: str) -> None:
        if address.startswith("ray://"):
            raise ConfigError(
                f"{ADDRESS_VARIABLE}: {address} goes through a proxy; run on a machine of the cluster, with "
                f"{ADDRESS_VARIABLE}=auto or host:port"
            )
        host, _, port = address.rpartition(":")
        try:
            if host and port.isdecimal():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            self.ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            raise ConfigError(
                f"{ADDRESS_VARIABLE}: no cluster can be used at {address} ({_first_line(error)}); start one with "
                f"`ray start`, or unset {ADDRESS_VARIABLE} to use this machine"
            ) from None

    def _start(self, resources: WorkerResources) -> None:
        default = tempfile.gettempdir()
        short = default if len(default) <= LONGEST_TEMPORARY else "/tmp"  # noqa: S108 - a fresh folder inside it
        self._directory = tempfile.mkdtemp(prefix="sfedlora-", dir=short)
        try:
            self.ray.init(
                address="local",
                num_cpus=resources.num_workers * resources.num_cpus,
                num_gpus=None if resources.num_gpus else 0,  # None: those that are visible
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=self._directory,
            )
        except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            raise RunError(
                f"Ray could not be started for {resources.num_workers} workers: {_first_line(error)}"
            ) from None

    def _require(self, resources: WorkerResources) -> None:
        """Refuse a cluster on which some workers would wait for ever."""
        there = self.ray.cluster_resources()
        for name, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
            needed = each * resources.num_workers
            if needed > there.get(name, 0):
                raise ConfigError(
                    f"workers: {resources.num_workers} workers with {each} {name}s each need {needed}, but the Ray "
                    f"cluster has {there.get(name, 0):g}; lower workers" + (" or threads" if name == "CPU" else "")
                )


@contextmanager
def _quiet_start(*, own: bool) -> Iterator[None]:
    """Ray's settings in the environment, where it looks for them; what is set already stays."""
    settings: dict[str, str] = dict(QUIET)
    token = _own_token()
    if own and token is not None:
        settings |= OWN
        if "RAY_AUTH_MODE" not in os.environ:
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@functools.cache
def _own_token() -> str | None:
    """The token of all clusters that this process starts; None where Ray was imported before and reads it no more."""
    return None if "ray" in sys.modules else secrets.token_hex(32)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
