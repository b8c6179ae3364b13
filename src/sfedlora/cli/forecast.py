"""What a run will do before it does it: clients, tokens, bytes, and a rough time."""

from __future__ import annotations

import math
import time
from statistics import median

import torch

from sfedlora.setup import Prepared
from sfedlora.types import Part, part_of

__all__ = ["describe_plan"]

STEP_SECONDS = 0.01
"""What a training step takes on a model so small that its products take no time."""
PROBE_SIZE, PROBE_SECONDS = 768, 0.1


def describe_plan(prepared: Prepared) -> list[str]:
    """Two lines: data and traffic of a round, and how long the run may take."""
    federation, config = prepared.federation, prepared.config
    counts = [len(rows) for rows in federation.participants.values()]
    cohort = federation.rounds.cohort_size or len(counts)
    lengths = federation.data.lengths
    rows = [row for own in federation.participants.values() for row in own]
    per_step = config.local.batch_size * config.local.accumulation
    steps = config.local.local_steps
    typical = int(median(counts))
    num_steps = steps if steps is not None else (config.local.local_epochs or 1) * math.ceil(typical / per_step)
    tokens = cohort * num_steps * min(per_step, typical) * float(lengths[rows].mean())
    shared = frozenset(Part) - federation.method.personal_parts()
    sent = shared & federation.method.trained_parts(1)
    up = sum(4 * value.numel() for name, value in federation.initial.items() if part_of(name) in sent) * cohort
    validation = sum(float(lengths[list(split.validation)].sum()) for split in federation.splits.values())
    speed, weights = _operations_per_second(prepared), _frozen_weights(prepared)
    train = 4 * weights * tokens / speed + STEP_SECONDS * cohort * num_steps
    evaluate = 2 * weights * validation / speed / config.evaluation.every
    workers = config.workers if isinstance(config.workers, int) else 1
    seconds = federation.rounds.num_rounds * (train + evaluate) / workers
    examples = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return [
        (
            f"each of {federation.rounds.num_rounds} rounds: {cohort} of {len(counts)} clients with {examples} "
            f"training examples, {num_steps} steps each, about {_count(tokens)} tokens, {_bytes(up)} to the server"
        ),
        f"expected time: roughly {_duration(seconds)} (from the speed of a matrix product; round 1 tells better)",
    ]


def _frozen_weights(prepared: Prepared) -> int:
    """Numbers in the matrices that a token passes, embeddings left out."""
    model = prepared.federation.resident.model
    embedded = {
        id(value)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for value in module.parameters()
    }
    return sum(value.numel() for value in model.parameters() if value.dim() > 1 and id(value) not in embedded)


def _operations_per_second(prepared: Prepared) -> float:
    device = prepared.federation.resident.device
    dtype = getattr(torch, prepared.base.dtype, torch.float32)
    matrix = torch.ones(
        PROBE_SIZE, PROBE_SIZE, dtype=dtype if dtype.is_floating_point else torch.float32, device=device
    )
    matrix @ matrix
    begin, products = time.monotonic(), 0
    while time.monotonic() - begin < PROBE_SECONDS:
        float((matrix @ matrix)[0, 0])  # waits for the device
        products += 1
    return products * 2.0 * PROBE_SIZE**3 / (time.monotonic() - begin)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count(number: float) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:.0f}"


def _bytes(number: float) -> str:
    return f"{number / 1e6:.1f} MB" if number < 1e9 else f"{number / 1e9:.2f} GB"
