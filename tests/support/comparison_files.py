"""Write a comparison's folder by hand: run directories of a grid and their results.jsonl."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from support.run_files import write_run

__all__ = ["write_comparison"]


def write_comparison(
    folder: Path, *, ranks: tuple[int, ...] = (8, 32), clients: tuple[int, ...] = (2, 4), seeds: tuple[int, ...] = (0,)
) -> Path:
    """Two scalings at every rank, number of clients and seed; |grad B| of lora falls with both, that of sfed is 1."""
    lines = []
    for scaling, rank, count, seed in itertools.product(("sfed", "lora"), ranks, clients, seeds):
        norm = 1.0 if scaling == "sfed" else (rank * count) ** -0.5
        run = write_run(
            folder / f"{scaling}-{rank}-{count}-{seed}",
            losses=[3.0 - 0.1 * norm, 2.9 - 0.2 * norm],
            norms=[norm, norm],
            initial=3.1,
            scaling=scaling,
            rank=rank,
            num_clients=count,
            seed=seed,
        )
        settings = {
            "lora.scaling": scaling,
            "lora.init": "independent",
            "lora.rank": rank,
            "partition.num_clients": count,
            "seed": seed,
        }
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        lines.append({"cell": run.name, "settings": settings, "run_dir": str(run), "summary": summary})
    results = folder / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
