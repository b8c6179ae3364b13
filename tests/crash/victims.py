"""Programs that are killed: federations of a few clients, and how their results are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from crash.deployment import Deployment
from crash.flower_server import Server
from sfedlora import RunConfig
from sfedlora.errors import Interrupted
from sfedlora.experiment import resume_events, run_events
from sfedlora.federation.round import ClientTrained
from sfedlora.setup import prepare
from support.command_line import write_config
from support.sentiment import write_sentiment

__all__ = ["SCENES", "Run", "Victim"]


class Victim(Protocol):
    """A program that can be killed and started again.

    `prepare` runs once in the parent (what it imports, no child imports again; it must not train, since a process that
    did cannot be forked), `start` in a child for every life of the program: it begins, or goes on with what it finds
    in the folder, and calls `boundary` at every moment worth a kill. `result` is what must be equal in the end.
    """

    def prepare(self, shared: Path) -> None:
        """Write what all runs read."""

    def watched(self, folder: Path) -> Path:
        """The part of the folder whose operations are fault points."""

    def is_finished(self, folder: Path) -> bool:
        """Whether there is nothing to go on with."""

    def start(self, shared: Path, folder: Path, boundary: Callable[[], None]) -> None:
        """Begin, or go on with what is in the folder."""

    def result(self, folder: Path) -> Mapping[str, bytes]:
        """Name -> content of everything that must be equal."""


@dataclass(frozen=True)
class Run:
    """A simulated federation on this machine.

    Attributes:
        sections: of its configuration.
        overrides: `key=value` settings on top.
        sentiment: a classification task with a head, in place of chat.
        stop_after: the first life is stopped as by Ctrl-C after so many trained clients.
    """

    sections: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    sentiment: bool = False
    stop_after: int | None = None

    def prepare(self, shared: Path) -> None:
        few = {"rounds": {"num_rounds": 2, "cohort_size": 2}, "evaluation": {"clients": "cohort"}, **self.sections}
        if self.sentiment:
            write_sentiment(shared, **few)
        else:
            lora = {"rank": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
            write_config(shared / "run.yaml", data={"max_length": 16}, lora=lora, **few)
        prepare(RunConfig.load(shared / "run.yaml", [*self.overrides, f"output={shared / 'never'}"]))

    def watched(self, folder: Path) -> Path:
        return folder

    def is_finished(self, folder: Path) -> bool:
        return (folder / "summary.json").is_file()

    def start(self, shared: Path, folder: Path, boundary: Callable[[], None]) -> None:
        if (folder / "config.yaml").is_file():
            for _ in resume_events(folder):
                boundary()
            return
        events = run_events(RunConfig.load(shared / "run.yaml", [*self.overrides, f"output={folder}"]))
        trained = 0
        for event in events:
            boundary()
            trained += isinstance(event, ClientTrained)
            if trained == self.stop_after:
                try:
                    cast("Any", events).throw(Interrupted("stop"))
                except Interrupted:
                    return

    def result(self, folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        content = {str(path.relative_to(folder)): path.read_bytes() for path in files}
        del content["config.yaml"], content["environment.json"]  # both name the folder
        lines = [json.loads(line) for line in content["metrics.jsonl"].splitlines()]
        untimed = [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in lines]
        return {**content, "metrics.jsonl": json.dumps(untimed).encode()}


STATEFUL = {"local__optimizer_state": "keep", "rounds__server_optimizer": "fedyogi"}
"""Across sites: B and moments there, moments of the server."""
_KEEP = {"local": {"optimizer_state": "keep", "local_steps": 2, "learning_rate": 1e-2, "batch_size": 4}}
SCENES: Mapping[str, Victim] = {
    "fedsa, serial, kept moments": Run(_KEEP, ("runner=serial", "lora.dropout=0.1")),
    "fedsa, stacks, kept moments": Run(_KEEP, ("runner=batched", "lora.dropout=0.1")),
    "fedsa, stopped in round 2": Run(_KEEP, ("runner=serial",), stop_after=3),
    "flora, serial": Run(overrides=("preset=flora", "runner=serial")),
    "flora, stacks": Run(overrides=("preset=flora", "runner=batched")),
    "fedex, serial": Run(overrides=("preset=fedex-lora", "runner=serial")),
    "fedex, stacks": Run(overrides=("preset=fedex-lora", "runner=batched")),
    "fedit with fedadam, serial": Run(
        overrides=(
            "preset=fedit",
            "runner=serial",
            "rounds.server_optimizer=fedadam",
            "rounds.server_learning_rate=0.01",
        )
    ),
    "fedit with fedavgm, stacks": Run(overrides=("preset=fedit", "runner=batched", "rounds.server_optimizer=fedavgm")),
    "local, serial": Run(overrides=("preset=null", "method.name=local", "lora.scaling=rslora", "runner=serial")),
    "personal heads, serial": Run(overrides=("method.head=personal", "runner=serial"), sentiment=True),
    "personal heads, stacks": Run(overrides=("method.head=personal", "runner=batched"), sentiment=True),
    "hetlora with ranks, serial": Run(overrides=("preset=hetlora", "lora.rank=[2,4,3]", "runner=serial")),
    "Flower server, fedsa with fedyogi, kept moments": Server(Deployment(STATEFUL)),
    "Flower server, fedex": Server(Deployment({"method__name": "fedex", "lora__scaling": "lora"})),
    "Flower server, personal heads": Server(Deployment({"method__head": "personal"}, sentiment=True)),
}
