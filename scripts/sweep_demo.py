"""Find the best learning rate at (rank 8, 2 clients), where all scaling rules have the same gamma; record it.

    python scripts/sweep_demo.py --task quick
    python scripts/sweep_demo.py --task chat
    python scripts/sweep_demo.py --task sentiment --data-dir .cache/data

Writes `src/sfedlora/assets/demo_sweep.json`, from which `sfedlora demo` reads its learning rate. The grid is fixed in
GRID before any run at the demonstration's own point; best is the lowest validation loss after the last round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from sfedlora.demo import MATCHED_CLIENTS, MATCHED_GAMMA, MATCHED_RANK, TASKS, demo_config, demo_rows, prepare_data
from sfedlora.errors import RunError
from sfedlora.experiment import run

GRID = {
    "quick": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "chat": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "sentiment": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
RECORD = Path(__file__).parent.parent / "src" / "sfedlora" / "assets" / "demo_sweep.json"


def main() -> None:
    """Run the sweep of one task and store its record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--data-dir", type=Path, default=None)
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    sfed = demo_rows()[0]
    losses: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(task, Path(folder), MATCHED_CLIENTS, arguments.data_dir)
        for rate in GRID[task.name]:
            config = demo_config(
                task, sfed, rank=MATCHED_RANK, data=data, learning_rate=rate, output=Path(folder) / f"rate-{rate}"
            )
            try:
                summary = run(config).summary
            except RunError as error:
                print(f"{rate:g}: {error}")
                losses[f"{rate:g}"] = None
                continue
            losses[f"{rate:g}"] = summary["last"]["validation"]["weighted"]["eval_loss"]
            start = summary["initial"]["validation"]["weighted"]["eval_loss"]
            print(f"{rate:g}: {start:.4f} -> {losses[f'{rate:g}']:.4f}", flush=True)
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    best = min(finite, key=lambda rate: finite[rate])
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    record[task.name] = {
        "rank": MATCHED_RANK,
        "num_clients": MATCHED_CLIENTS,
        "gamma": MATCHED_GAMMA,
        "optimizer": task.optimizer,
        "num_rounds": task.num_rounds,
        "local_steps": task.local_steps,
        "batch_size": task.batch_size,
        "initial_validation_loss": start,
        "validation_loss_by_learning_rate": losses,
        "best_learning_rate": float(best),
        "command": f"python scripts/sweep_demo.py --task {task.name}",
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
