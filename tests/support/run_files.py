"""Write run directories by hand, from DESIGN's contract and not from the code that writes real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["add_clients", "write_run"]


def write_run(
    path: Path,
    *,
    losses: Sequence[float | None],
    norms: Sequence[float],
    initial: float | None,
    scaling: str = "sfed",
    rank: int = 8,
    num_clients: int = 4,
    seed: int = 0,
) -> Path:
    """A run with one line per loss; `initial` is the loss before round 1, None for a run without summary."""
    path.mkdir(parents=True)
    config = {
        "lora": {"rank": rank, "scaling": scaling, "init": "independent"},
        "method": {"name": "fedsa"},
        "partition": {"num_clients": num_clients},
        "seed": seed,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [
        {"round_num": at, "eval_loss": loss, "grad_norm_b": norm, "grad_norm_a": 0.0, "something_new": {"a": 1}}
        for at, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if initial is not None:
        start, end = ({"validation": {"weighted": {"eval_loss": loss}}} for loss in (initial, losses[-1]))
        (path / "summary.json").write_text(json.dumps({"initial": start, "last": end, "best": end}), encoding="utf-8")
    return path


def add_clients(path: Path, clients: Mapping[str, tuple[float, float]], excluded: Mapping[str, str]) -> None:
    """Add to every round of a run what its clients have: id -> (initial loss, loss); and who was excluded and why."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["clients"] = {
            client: {"num_examples": 8, "train_loss": last, "grad_norm_b": 1.0, "eval_loss": last}
            for client, (_, last) in clients.items()
        }
        line |= {"excluded": dict(excluded), "cohort": [*clients, *excluded], "gain": 0.5, "tokens": 100}
        line |= {"train_seconds": 2.0, "aggregate_seconds": 0.25, "eval_seconds": 0.5}
        line |= {"bytes_up": 3_000_000, "bytes_down": 1_000_000}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = {"train": list(range(8)), "validation": [8], "test": [9, 10]}
    partition: dict[str, Any] = {"source_sha256": "0", "clients": {client: {"dir": "x", **rows} for client in clients}}
    (path / "partition.json").write_text(json.dumps(partition), encoding="utf-8")
    initial = {client: {"eval_loss": first} for client, (first, _) in clients.items()}
    summary = path / "summary.json"
    if summary.is_file():
        content = json.loads(summary.read_text(encoding="utf-8"))
        content["initial"]["validation"]["clients"] = initial
        summary.write_text(json.dumps(content), encoding="utf-8")
    else:
        folder = path / "checkpoints" / "round-000001"
        folder.mkdir(parents=True)
        state = {"round_num": 1, "progress": {"initial": {"validation": {"clients": initial}}}}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
