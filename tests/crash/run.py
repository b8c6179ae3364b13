"""The crash tests from the command line: `python tests/crash/run.py`; prints the counts of every scene and of all."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from crash.flower_node import NODES, node_campaign
from crash.harness import Counts, Plan, campaign
from crash.victims import SCENES


def main() -> int:
    """Run the chosen scenes; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the fault points (1: all)")
    parser.add_argument("--power-share", type=float, default=1.0, help="share of the operations at which power is lost")
    parser.add_argument("--random-times", type=int, default=0, help="kills at random times, per scene")
    parser.add_argument("--scene", action="append", choices=[*SCENES, *NODES], help="only this scene; may be repeated")
    parser.add_argument("--work", type=Path, help="folder for the runs; one in memory makes syncs fast (/dev/shm)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write the counts there as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process with a pool of threads would hang
    total, scenes = Counts(), arguments.scene or [*SCENES, *NODES]
    for number, name in enumerate(scenes):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sfedlora-crash-", dir=arguments.work) as work:
            plan = Plan(arguments.share, arguments.power_share, arguments.random_times, arguments.seed + number)
            folder = Path(work) / "scene"
            if name in NODES:
                counts = node_campaign(NODES[name], folder, plan, _say)
            else:
                counts = campaign(SCENES[name], folder, plan, _say)
        total.add(counts)
        print(f"{name}: {_line(counts)}, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"all {len(scenes)} scenes: {_line(total)}", flush=True)
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(asdict(total), indent=2) + "\n", encoding="utf-8")
    return 1 if total.mismatches else 0


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _line(counts: Counts) -> str:
    return (
        f"{counts.fault_points} fault points, {counts.faults_tried} faults tried, {counts.kills} kills "
        f"({counts.power_losses} with power loss, {counts.resumes_killed} of a resume), {counts.resumes} resumes, "
        f"{len(counts.mismatches)} mismatches"
    )


if __name__ == "__main__":
    sys.exit(main())
