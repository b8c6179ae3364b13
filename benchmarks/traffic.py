"""Bytes that a client sends and receives in a round, per method, as a run's metrics.jsonl reports them.

    python benchmarks/traffic.py                     # rank 16 on the tiny model of the package
    python benchmarks/traffic.py --rank 128

Counts of a real run of three rounds on chat pairs with four clients in every round, the third round's by client: the
adapter has q and v of two layers of width 64. Their pattern at any size is in the methods table of the documentation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sfedlora import RunConfig, run
from sfedlora.methods import METHODS


def main() -> None:
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            record = run(RunConfig.from_mapping(_config(method, arguments.rank, Path(folder)))).metrics[-1]
        up, down = (record[key] / len(record["cohort"]) for key in ("bytes_up", "bytes_down"))
        print(f"bytes per client and round, {method:<12} up {up:>9.0f}   down {down:>9.0f}", flush=True)


def _config(method: str, rank: int, folder: Path) -> dict[str, object]:
    return {
        "model": {"source": "package:sfedlora/assets/tiny_llama"},
        "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "max_length": 48},
        "partition": {"scheme": "iid", "num_clients": 4},
        "lora": {"rank": rank, "scaling": "rslora", "target_modules": ["q_proj", "v_proj"]},
        "method": {"name": method},
        "rounds": {"num_rounds": 3},
        "local": {"local_steps": 1},
        "threads": 1,
        "output": str(folder / "run"),
    }


if __name__ == "__main__":
    main()
