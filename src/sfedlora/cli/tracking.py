"""Rounds of a run in TensorBoard, Weights & Biases, MLflow or trackio, through accelerate's trackers; off by default.

Everything stays on this machine unless the tracker's own environment variables say otherwise: TensorBoard and MLflow
write into the run directory (`tracking/`), trackio into its local store, and Weights & Biases runs offline
(`wandb sync` uploads) unless WANDB_MODE is set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from sfedlora.config.flatten import flatten
from sfedlora.errors import ConfigError
from sfedlora.experiment import RunPrepared, RunResult
from sfedlora.federation.round import RoundFinished

__all__ = ["TRACKERS", "Trackers"]

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Trackers:
    """The trackers of the run that goes on; several runs follow each other. A context that ends them."""

    def __init__(self, names: Sequence[str]) -> None:
        """Check the names.

        Raises:
            ConfigError: a tracker that is not known, or whose package is not installed.
        """
        for name in names:
            if name not in TRACKERS:
                raise ConfigError(f"--track {name}: unknown tracker; choose from {', '.join(TRACKERS)}")
            if find_spec(name) is None or find_spec("accelerate") is None:
                raise ConfigError(f"--track {name}: not installed; pip install 'sfedlora[trackers]'")
        self._names = tuple(dict.fromkeys(names))
        self._running: list[Any] = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()

    def show(self, event: object) -> None:
        """Take notice of an event of a run."""
        if isinstance(event, RunPrepared):
            self._finish()
            settings = _plain(flatten(event.prepared.config.model_dump(mode="json")))
            self._running = [_start(name, event.run_dir) for name in self._names]
            for tracker in self._running:
                if event.first_round == 1:
                    tracker.store_init_configuration(settings)
        elif isinstance(event, RoundFinished):
            for tracker in self._running:
                tracker.log(scalars(event.record), step=int(event.record["round_num"]))
        elif isinstance(event, RunResult):
            self._finish()

    def _finish(self) -> None:
        for tracker in self._running:
            tracker.finish()
        self._running = []


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl, those of single clients left out."""
    kept = {}
    for key, value in record.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and key not in ("schema_version", "round_num") and math.isfinite(value):
            kept[key] = float(value)
    return kept


def _start(name: str, run_dir: Path) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's loggers ask it which process they are in
    folder = run_dir / "tracking"
    folder.mkdir(exist_ok=True)
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker(name, logging_dir=folder)
    elif name == "wandb":
        tracker = tracking.WandBTracker(
            "sfedlora", name=run_dir.name, dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline")
        )
    elif name == "mlflow":
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        tracker = tracking.MLflowTracker("sfedlora", logging_dir=str(folder / "artifacts"), run_name=run_dir.name)
    else:
        tracker = tracking.TrackioTracker("sfedlora", name=run_dir.name)
    if hasattr(tracker, "start"):  # accelerate 1.12 and later set up here, not when made
        tracker.start()
    return tracker


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as every tracker takes them: numbers, truth values and text."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
    }
