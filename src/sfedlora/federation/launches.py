"""Which clients of a stack share a forward pass: neighbours whose batches have like shapes.

All clients of one pass compute as many rows and tokens as the largest batch among them; every pass costs something of
its own besides. Here the two are weighed. Not here: which clients make a stack (`runners.batched`), which examples make
a batch (`data.batches`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["LAUNCH_TOKENS", "plan_launches"]

LAUNCH_TOKENS = {"cpu": 48, "cuda": 4096, "mps": 1024}
"""What a forward and backward pass costs besides its tokens, in tokens.

On one CPU core 21 for a Llama of width 576, 31 for width 256, 101 for the tiny one of the package (intercept over slope
of the time for 8 to 512 tokens). The others are estimates, not measured: kernel launches of 30 layers against the
arithmetic of 135 M parameters.
"""


def plan_launches(shapes: Sequence[tuple[int, int]], launch_tokens: int) -> list[tuple[int, int]]:
    """Cut the clients of a stack into runs of neighbours so that computed tokens and passes together cost least.

    A run [start, stop) costs `launch_tokens + (stop - start) * largest rows * largest tokens`; one of empty batches
    costs nothing and is left out.

    Args:
        shapes: (rows, tokens) of each client's batch; (0, 0) for a client that has none.
        launch_tokens: cost of one pass, in tokens.

    Returns:
        (start, stop) of each run, in order. They cover every client that has a batch.
    """
    if len(set(shapes)) == 1:
        return [(0, len(shapes))] if shapes[0][0] else []
    rows, tokens = np.array(shapes, dtype=np.int64).T
    cheapest = np.zeros(len(shapes) + 1, dtype=np.int64)
    starts = np.zeros(len(shapes) + 1, dtype=np.int64)
    for stop in range(1, len(shapes) + 1):
        largest_rows, largest_tokens = (np.maximum.accumulate(sizes[:stop][::-1])[::-1] for sizes in (rows, tokens))
        computed = np.arange(stop, 0, -1) * largest_rows * largest_tokens
        costs = cheapest[:stop] + computed + np.where(largest_rows > 0, launch_tokens, 0)
        starts[stop] = int(costs.argmin())  # the first of equal costs: the longest run
        cheapest[stop] = costs[starts[stop]]
    runs: list[tuple[int, int]] = []
    stop = len(shapes)
    while stop > 0:
        start = int(starts[stop])
        if rows[start:stop].any():
            runs.append((start, stop))
        stop = start
    return runs[::-1]
