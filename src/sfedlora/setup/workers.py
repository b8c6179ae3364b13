"""A federation whose clients are dealt over workers: what a worker prepares, and what must agree with the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.ray_cluster import WorkerResources
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.runners.workers import WorkersRunner
from sfedlora.federation.state import Federation

__all__ = ["Fingerprint", "fingerprint", "with_workers"]


@dataclass(frozen=True)
class Fingerprint:
    """What two processes must have in common to train clients of one federation to the same bits."""

    versions: str
    configuration: str
    data: str
    base_model: str


def fingerprint(config: RunConfig, partition: Mapping[str, Any], environment: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a prepared federation: its resolved configuration, partition.json and environment.json."""
    settings = config.model_dump(mode="json", exclude={"output", "workers"})
    return Fingerprint(
        versions=", ".join(f"{name} {version}" for name, version in sorted(environment["versions"].items())),
        configuration=_digest(settings),
        data=_digest(partition),
        base_model=str(environment["base_model"]["sha256"]),
    )


def with_workers(
    federation: Federation,
    config: RunConfig,
    expected: Fingerprint,
    prepare_federation: Callable[[RunConfig], tuple[Federation, Fingerprint]],
) -> Federation:
    """The federation with its runner on several workers; none is started yet.

    Args:
        federation: as one process runs it.
        config: resolved, with more than one worker.
        expected: its fingerprint.
        prepare_federation: a function of a module, that workers can import, which does what this process did.
    """
    runner, num_workers, threads = federation.runner, config.workers, config.threads
    if not isinstance(runner, SerialRunner | BatchedRunner) or num_workers == "auto" or threads is None:
        raise ConfigError("workers: the configuration was not resolved")
    on_gpu = config.device.startswith("cuda")
    resources = WorkerResources(num_workers, num_cpus=1 if on_gpu else threads, num_gpus=1 if on_gpu else 0)
    settings = config.with_values({"workers": 1}).model_dump(mode="json")
    start = partial(_worker_federation, settings, expected, str(Path.cwd()), prepare_federation)
    return replace(federation, runner=WorkersRunner(runner, resources, start))


def _worker_federation(
    settings: Mapping[str, Any],
    expected: Fingerprint,
    directory: str,
    prepare_federation: Callable[[RunConfig], tuple[Federation, Fingerprint]],
) -> Federation:
    """Prepare the run in this process, which is a worker's.

    Raises:
        InputError: model or data are not here, or not those of the run.
    """
    if Path(directory).is_dir():
        os.chdir(directory)  # paths in a configuration are relative to where the run was started
    federation, found = prepare_federation(RunConfig.from_mapping(settings))
    for name, value in asdict(expected).items():
        other = asdict(found)[name]
        if other != value:
            raise ConfigError(
                f"it has another {name.replace('_', ' ')} than the run ({other}, not {value}); every machine needs the "
                "same library versions, and the same model and data under the same paths"
            )
    return federation


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
