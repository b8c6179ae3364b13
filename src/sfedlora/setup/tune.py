"""Measure how many clients in one forward pass suit this machine, model and data, instead of taking the built-in caps.

What is measured is the training of the run's own clients, a few steps each; nothing of it is kept but the number. The
seconds differ from day to day and so may the choice, so it is written into the configuration, on which results depend.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sfedlora.config import RunConfig
from sfedlora.errors import ClientError, ConfigError
from sfedlora.federation.client import ClientWork
from sfedlora.federation.round import make_work
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.sampling import sample_cohort
from sfedlora.federation.state import initial_state
from sfedlora.setup import Prepared, prepare
from sfedlora.setup.resolve import MAX_STACK, why_not_stackable

__all__ = ["Measured", "Tuned", "candidates", "choose", "tune"]

NUM_STEPS, NUM_CLIENTS, NUM_REPEATS = 2, 8, 2
"""Optimizer steps of a client, least number of clients, and how often all is measured; the fastest time counts."""
TOLERANCE = 1.03
"""Fewer clients in a pass are taken where they are at most so much slower than the fastest: less memory and padding."""


@dataclass(frozen=True)
class Measured:
    """The training of some clients.

    Attributes:
        clients_per_batch: clients in one forward pass.
        seconds_per_token: wall seconds per real token; None where memory did not hold so many.
    """

    clients_per_batch: int
    seconds_per_token: float | None


@dataclass(frozen=True)
class Tuned:
    """A configuration with `runner` and `clients_per_batch` as measured, and what was measured."""

    config: RunConfig
    measured: tuple[Measured, ...]


def tune(config: RunConfig) -> Tuned:
    """Measure 1, 2, 4, ... clients in a pass, as far as the cohort goes, and take the best.

    Raises:
        ConfigError: `runner` or `clients_per_batch` is given already.
        InputError: as `prepare`.
        ClientError: a client cannot be trained.
    """
    if config.runner != "auto" or config.clients_per_batch != "auto":
        raise ConfigError(
            f"--tune chooses runner and clients_per_batch, but the configuration gives runner: {config.runner}, "
            f"clients_per_batch: {config.clients_per_batch}; set both to auto, or leave --tune out"
        )
    threads, workers = torch.get_num_threads(), config.workers
    of_one_worker = config.threads or (threads // workers if workers != "auto" and workers > 1 else None)
    try:
        measured = _measure(prepare(config.with_values({"workers": 1, "threads": of_one_worker})))
    finally:
        torch.set_num_threads(threads)
    chosen = choose(measured)
    runner = "serial" if chosen == 1 else "batched"
    return Tuned(config.with_values({"runner": runner, "clients_per_batch": chosen}), measured)


def candidates(largest: int) -> list[int]:
    """The numbers to measure: powers of 2, and the largest."""
    numbers = [2**power for power in range(MAX_STACK.bit_length()) if 2**power <= min(largest, MAX_STACK)]
    return sorted({*numbers, min(largest, MAX_STACK)})


def choose(measured: Sequence[Measured]) -> int:
    """The smallest number that is about as fast as the fastest."""
    seconds = {item.clients_per_batch: item.seconds_per_token for item in measured}
    known = {number: value for number, value in seconds.items() if value is not None}
    return min(number for number, value in known.items() if value <= TOLERANCE * min(known.values()))


def _measure(prepared: Prepared) -> tuple[Measured, ...]:
    """Time the clients of the first cohort; every candidate in turn, several times, so that all meet the same load."""
    federation, config = prepared.federation, prepared.config
    runner = federation.runner
    if not isinstance(runner, SerialRunner | BatchedRunner):
        raise ConfigError(f"--tune: cannot measure with {type(runner).__name__}; set workers: 1")
    setup = replace(runner.setup, training=replace(runner.setup.training, local_steps=NUM_STEPS, local_epochs=None))
    size = federation.rounds.cohort_size
    cohort = sample_cohort(list(federation.participants), size, seed=federation.seed, round_num=1)
    targets = [target.path for target in federation.resident.layout.targets]
    stackable = not why_not_stackable(config, prepared.base, targets)
    numbers = candidates(len(cohort) if stackable else 1)
    state = initial_state(federation)
    times: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(NUM_REPEATS):
        for number in list(times):
            measuring = SerialRunner(setup) if number == 1 else BatchedRunner(setup, number)
            order = measuring.order({client_id: federation.participants[client_id] for client_id in cohort})
            chosen = _spread(order, number)
            seconds = _seconds_per_token(measuring, (make_work(federation, state, one) for one in chosen))
            if measuring.clients_per_batch == number:
                times[number].append(seconds)
            else:
                del times[number]
    return tuple(Measured(number, min(times[number]) if number in times else None) for number in numbers)


def _spread(order: Sequence[str], number: int) -> list[str]:
    """Whole stacks of neighbours, at equal distances, of at least `NUM_CLIENTS` clients together if there are."""
    stacks = [order[start : start + number] for start in range(0, len(order), number)]
    whole = [stack for stack in stacks if len(stack) == number]
    wanted = min(len(whole), -(-NUM_CLIENTS // number))
    places = [(2 * place + 1) * len(whole) // (2 * wanted) for place in range(wanted)]
    return [client_id for place in places for client_id in whole[place]]


def _seconds_per_token(runner: Runner, works: Iterator[ClientWork]) -> float:
    begin, tokens = time.perf_counter(), 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ clients in one batch do not fit into memory")
        for result in runner.run_cohort(works):
            if isinstance(result, ClientError):
                raise result
            tokens += result.metrics.tokens
    return (time.perf_counter() - begin) / tokens
