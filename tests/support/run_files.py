"""Write run directories by hand, from DESIGN's contract and not from the code that writes real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

__all__ = ["write_run"]


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
