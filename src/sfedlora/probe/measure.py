"""The measurements of a probe: cells of a small grid and ladders of learning rates, on one loaded base model.

All cells use the same clients with the same rows: where a cell has fewer clients than the largest, the clients form
several federations of that size and their means count. So neither data nor the number of rows differs between sizes.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from sfedlora.config import RunConfig
from sfedlora.data.partition import ClientSplit
from sfedlora.errors import ConfigError, DataError, RunError
from sfedlora.federation.client import LocalTraining, TrainingSetup
from sfedlora.federation.evaluate import mean_results
from sfedlora.federation.initialize import form_initial_a
from sfedlora.federation.round import RoundFinished, evaluate_clients, run_rounds
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.state import Federation, RoundSettings, initial_state
from sfedlora.lora.scaling import ScalingRule, scaling_factor
from sfedlora.seeds import numpy_generator
from sfedlora.setup import Prepared, prepare
from sfedlora.setup.adapter import initial_adapter
from sfedlora.types import LoraSize, LoraSizes, Part

__all__ = ["Cell", "LadderStep", "Measurements", "Plan", "Progress", "Size", "probe_events"]

RULES: tuple[ScalingRule, ...] = ("sfed", "rslora", "lora")
SMALL_STEP, VISIBLE_STEP = 0.001, 0.01
"""Share of the loss that one step takes away at most in the law's cells, for the law is one to leading order; and where
the loss itself is measured."""
LADDER_FACTOR, LONGEST_LADDER = 4.0, 9
DIVERGED_LOSS = 1.1
"""Times the initial loss."""
LARGEST_BATCH, LADDER_STEPS, LADDER_ROUNDS, LADDER_HELD_OUT = 8, 4, 2, 16


@dataclass(frozen=True)
class Plan:
    """What a probe measures.

    Attributes:
        ranks: at the largest number of clients.
        clients: at the middle rank; each divides the largest.
    """

    ranks: tuple[int, ...] = (4, 32, 256)
    clients: tuple[int, ...] = (2, 4, 8)

    @property
    def middle_rank(self) -> int:
        """The rank at which the number of clients varies."""
        return sorted(self.ranks)[len(self.ranks) // 2]


@dataclass(frozen=True)
class Size:
    """One point of the grid."""

    rank: int
    num_clients: int


@dataclass(frozen=True)
class Cell:
    """One scaling at one size: what was measured in round 2, means over clients."""

    rule: ScalingRule
    init: Literal["independent", "shared"]
    size: Size
    grad_norm_b: float
    grad_norm_a: float
    gain: float


@dataclass(frozen=True)
class LadderStep:
    """One learning rate at one size.

    Attributes:
        size: the size.
        learning_rate: the rate.
        loss: validation loss after the last round; None where a client's training gave no finite loss.
        diverged: whether there is no loss, or one above DIVERGED_LOSS times the initial one.
    """

    size: Size
    learning_rate: float
    loss: float | None
    diverged: bool


@dataclass(frozen=True)
class Measurements:
    """What a probe measured.

    Attributes:
        config: the configuration as given.
        num_clients: clients of the user's own federation.
        effective_clients: its count by weights, 1 / sum w^2.
        measured_clients: its count by the draws themselves; None where they were not made one by one.
        cells: the grid, with sfed, rslora and lora on independent draws, and sfed with plain N on one shared draw.
        adam_steps: (rule, rank, loss that one AdamW step takes away); empty for SGD.
        ladders: learning rates with sfed and independent draws, at the smallest and the largest number of clients.
        initial_loss: validation loss of the untouched model on the slice, nats.
        law_learning_rate: SGD learning rate of the cells.
        seconds: how long it all took.
    """

    config: RunConfig
    num_clients: int
    effective_clients: float
    measured_clients: float | None
    cells: tuple[Cell, ...]
    adam_steps: tuple[tuple[ScalingRule, int, float], ...]
    ladders: tuple[LadderStep, ...]
    initial_loss: float
    law_learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """One of a number of steps is done."""

    done: int
    total: int
    what: str


@dataclass(frozen=True)
class _Bench:
    """The loaded model and the slice of data.

    Attributes:
        prepared: the model, and the user's own clients.
        clients: the probe's clients with one batch each, the same in every round: for slopes.
        ladder_clients: the same clients with a batch for every step, as far as the data goes: for learning rates. On
            one batch over and over, a loss that rises by memorising would look like one that diverges.
        batch_size: examples of a step.
        rank_of_user: the configuration's rank.
    """

    prepared: Prepared
    clients: Mapping[str, ClientSplit]
    ladder_clients: Mapping[str, ClientSplit]
    batch_size: int
    rank_of_user: int = field(default=8)


def probe_events(config: RunConfig, plan: Plan) -> Iterator[Progress | Measurements]:
    """Measure; the last event holds the result.

    Raises:
        InputError: model, data and configuration do not fit together, or the data is too small.
    """
    begin = time.monotonic()
    _check(plan)
    bench = _set_up(config, plan)
    largest = Size(plan.middle_rank, max(plan.clients))
    grid = [(rule, "independent", size) for rule in RULES for size in _sizes(plan)]
    shared = [("sfed", "shared", size) for size in _sizes(plan) if size.rank == plan.middle_rank]
    adam = [(rule, rank) for rule in RULES for rank in sorted(plan.ranks)] if _is_adamw(config) else []
    total, done = len(grid) + len(shared) + len(adam) + 4, 0
    loss = _initial_loss(bench, largest)
    norm = _cell(bench, "sfed", "independent", largest, 0.0).grad_norm_b
    rate = SMALL_STEP * loss / norm**2
    done += 1
    yield Progress(done, total, f"initial loss {loss:.4g}, |grad B| {norm:.3g} with sfed")
    cells = []
    for rule, init, size in [*grid, *shared]:
        cells.append(_cell(bench, rule, init, size, rate))  # type: ignore[arg-type]
        done += 1
        yield Progress(done, total, f"{rule}, {init} draws, r = {size.rank}, N = {size.num_clients}")
    steps = []
    for rule, rank in adam:
        steps.append((rule, rank, _adam_step(bench, rule, Size(rank, min(plan.clients)), norm)))
        done += 1
        yield Progress(done, total, f"{rule}, one AdamW step, r = {rank}")
    ladders: list[LadderStep] = []
    first = _first_rate(bench, loss, norm)
    for num_clients in sorted({min(plan.clients), max(plan.clients)}):
        size = Size(bench.rank_of_user, num_clients)
        steps_here = _ladder(bench, size, first)
        ladders += steps_here
        stable = [step.learning_rate for step in steps_here if not step.diverged]
        first = max(stable) / LADDER_FACTOR if stable else first  # where the next size begins
        done += 1
        yield Progress(done, total, f"learning rates at r = {size.rank}, N = {num_clients}")
    counts = bench.prepared.environment["scaling"]
    yield Measurements(
        config=config,
        num_clients=len(bench.prepared.federation.splits),
        effective_clients=counts["averaged_effective_clients"],
        measured_clients=counts["measured_effective_clients"],
        cells=tuple(cells),
        adam_steps=tuple(steps),
        ladders=tuple(ladders),
        initial_loss=loss,
        law_learning_rate=rate,
        seconds=time.monotonic() - begin,
    )


def _check(plan: Plan) -> None:
    largest = max(plan.clients)
    for name, sizes in (("--ranks", plan.ranks), ("--clients", plan.clients)):
        if len(set(sizes)) < 2 or min(sizes) < 1:
            raise ConfigError(f"{name}: a slope needs two different sizes of at least 1, got {list(sizes)}")
    for count in plan.clients:
        if largest % count:
            raise ConfigError(f"--clients: {count} does not divide the largest, {largest}; use for example 2,4,8")


def _sizes(plan: Plan) -> list[Size]:
    largest = max(plan.clients)
    by_rank = [Size(rank, largest) for rank in sorted(plan.ranks)]
    by_clients = [Size(plan.middle_rank, count) for count in sorted(plan.clients)]
    return list(dict.fromkeys([*by_rank, *by_clients]))


def _set_up(config: RunConfig, plan: Plan) -> _Bench:
    """Load the model once, with the user's own clients, and deal a slice of their rows to the probe's clients."""
    own = config.lora.rank
    rank = own if isinstance(own, int) else max(own)
    values: dict[str, Any] = {
        "method.name": "fedsa",
        "method.head": "auto",
        "lora.scaling": "sfed",
        "lora.init": "independent",
    }
    values |= {"lora.rank": rank, "lora.rank_assignment": "listed", "rounds.server_optimizer": "none"}
    values |= {"runner": "serial", "clients_per_batch": 1, "workers": 1, "local.optimizer_state": "reset"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank .* is above min")
        prepared = prepare(config.with_values(values))
    rows = sorted(row for split in prepared.federation.splits.values() for row in split.train)
    numpy_generator(config.seed, "probe").shuffle(rows)
    count = max(plan.clients)
    batch_size = min(config.local.batch_size, LARGEST_BATCH, len(rows) // (2 * count))
    if batch_size < 1:
        raise DataError(f"the probe needs at least {2 * count} training examples for {count} clients, got {len(rows)}")
    clients = _deal(rows, count, batch_size, batch_size)
    share = len(rows) // count
    held_out = max(1, min(LADDER_HELD_OUT, share // 3))
    ladder = _deal(rows, count, min(share - held_out, LADDER_STEPS * LADDER_ROUNDS * batch_size), held_out)
    return _Bench(prepared, clients, ladder, batch_size, rank)


def _deal(rows: Sequence[int], count: int, num_train: int, num_held_out: int) -> dict[str, ClientSplit]:
    """So many clients with rows of their own."""
    clients, size = {}, num_train + num_held_out
    for at in range(count):
        own = tuple(rows[at * size : (at + 1) * size])
        clients[f"probe-{at:03d}"] = ClientSplit(own[:num_train], own[num_train:], own[num_train:])
    return clients


def _is_adamw(config: RunConfig) -> bool:
    return config.local.optimizer == "adamw"


def _groups(bench: _Bench, size: Size) -> list[list[str]]:
    names = sorted(bench.clients)
    return [names[start : start + size.num_clients] for start in range(0, len(names), size.num_clients)]


def _federation(  # noqa: PLR0917 - what distinguishes the probe's short federations
    bench: _Bench,
    rule: ScalingRule,
    init: Literal["independent", "shared"],
    size: Size,
    members: Sequence[str],
    training: LocalTraining,
    learning_rate: float,
    num_rounds: int,
) -> Federation:
    """A federation of some of the probe's clients on the loaded model."""
    base, seed = bench.prepared.federation, bench.prepared.config.seed
    resident = base.resident
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank .* is above min")
        resident.resize(size.rank)
    weights = {client: 1.0 / len(members) for client in members}
    formed = form_initial_a(resident.layout, size.rank, weights=weights, init=init, seed=seed)
    # Plain N on a shared draw: what the paper's formula gives to who leaves out the independent draws.
    count = float(len(members)) if init == "shared" else formed.effective_clients
    alpha = bench.prepared.config.lora.alpha
    gamma = scaling_factor(rule, alpha=alpha, rank=size.rank, num_clients=count)
    head = {name: value for name, value in base.initial.items() if name.startswith(f"{Part.HEAD.value}:")}
    splits = {client: bench.clients[client] for client in members}
    return replace(
        base,
        runner=SerialRunner(TrainingSetup(resident, base.data, training, base.task, base.pad_token_id, seed)),
        splits=splits,
        participants={client: split.train for client, split in splits.items()},
        external={},
        initial=initial_adapter(resident.layout, formed, head, size.rank),
        init=init,
        sizes=LoraSizes(LoraSize(size.rank, gamma)),
        effective_clients=formed.effective_clients,
        rounds=RoundSettings(num_rounds, None, "uniform", learning_rate, "constant", 0, num_rounds, "all"),
    )


def _training(bench: _Bench, optimizer: Literal["adamw", "sgd"], num_steps: int) -> LocalTraining:
    local = bench.prepared.config.local
    return LocalTraining(
        optimizer=optimizer,
        learning_rate_a_ratio=local.learning_rate_a_ratio,
        weight_decay=0.0,
        batch_size=bench.batch_size,
        accumulation=1,
        local_steps=num_steps,
        local_epochs=None,
        max_grad_norm=None,
        keep_optimizer_state=False,
    )


def _initial_loss(bench: _Bench, size: Size) -> float:
    federation = _federation(
        bench, "sfed", "independent", size, sorted(bench.clients), _training(bench, "sgd", 1), 0.0, 1
    )
    return _loss(federation, "validation")


def _loss(federation: Federation, split: Literal["train", "validation"]) -> float:
    evaluated = evaluate_clients(federation, initial_state(federation), split, sorted(federation.splits))
    results = {client: result for client, _, result in evaluated}
    return float(mean_results(results, weighted=False)["eval_loss"])


def _cell(
    bench: _Bench, rule: ScalingRule, init: Literal["independent", "shared"], size: Size, learning_rate: float
) -> Cell:
    """Round 2 after one small SGD step of every client."""
    records = []
    for members in _groups(bench, size):
        training = _training(bench, "sgd", 1)
        federation = _federation(bench, rule, init, size, members, training, learning_rate, 2)
        federation = replace(federation, rounds=replace(federation.rounds, evaluated=1))
        events = run_rounds(federation, initial_state(federation))
        records += [event.record for event in events if isinstance(event, RoundFinished)][1:]
    norms = [(record["grad_norm_b"], record["grad_norm_a"], record["gain"]) for record in records]
    b, a, gain = (fmean(each[at] for each in norms) for at in range(3))
    return Cell(rule, init, size, b, a, gain)


def _adam_step(bench: _Bench, rule: ScalingRule, size: Size, norm: float) -> float:
    """How much loss on the training batch one AdamW step takes away, first group of clients.

    To first order that is learning_rate * ||grad B||_1, for AdamW's first step moves every entry by the rate.
    """
    members = _groups(bench, size)[0]
    entries = sum(target.out_features for target in bench.prepared.federation.resident.layout.targets)
    base = _federation(bench, rule, "independent", size, members, _training(bench, "adamw", 1), 0.0, 1)
    before = _loss(base, "train")
    rate = VISIBLE_STEP * before / (norm * math.sqrt(entries * size.rank))
    federation = replace(base, rounds=replace(base.rounds, learning_rate=rate, evaluated=1))
    state = initial_state(federation)
    for event in run_rounds(federation, state):
        if isinstance(event, RoundFinished):
            state = event.state
    evaluated = evaluate_clients(base, state, "train", members)
    after = float(mean_results({c: r for c, _, r in evaluated}, weighted=False)["eval_loss"])
    return (before - after) / rate


def _first_rate(bench: _Bench, loss: float, norm: float) -> float:
    """Where a ladder begins: well below what diverges."""
    if not _is_adamw(bench.prepared.config):
        return VISIBLE_STEP * loss / norm**2
    return 1e-4


def _ladder(bench: _Bench, size: Size, first: float) -> list[LadderStep]:
    """Rates up to the first that diverges, then one between it and the last that did not."""
    steps = [_try(bench, size, first)]
    factor = 1 / LADDER_FACTOR if steps[0].diverged else LADDER_FACTOR
    while len(steps) < LONGEST_LADDER and steps[-1].diverged == steps[0].diverged:
        steps.append(_try(bench, size, steps[-1].learning_rate * factor))
    good = [step.learning_rate for step in steps if not step.diverged]
    bad = [step.learning_rate for step in steps if step.diverged]
    if good and bad:
        steps.append(_try(bench, size, math.sqrt(max(good) * min(bad))))
    return sorted(steps, key=lambda step: step.learning_rate)


def _try(bench: _Bench, size: Size, learning_rate: float) -> LadderStep:
    config = bench.prepared.config
    num_steps = min(config.local.local_steps or LADDER_STEPS, LADDER_STEPS)
    members = _groups(bench, size)[0]
    training = _training(bench, config.local.optimizer, num_steps)
    roomy = replace(bench, clients=bench.ladder_clients)
    federation = _federation(roomy, "sfed", "independent", size, members, training, learning_rate, LADDER_ROUNDS)
    start = _loss(federation, "validation")
    loss: float | None = None
    try:
        for event in run_rounds(federation, initial_state(federation)):
            if isinstance(event, RoundFinished):
                loss = event.record["eval_loss_unweighted"]
                if event.record["excluded"]:
                    loss = None
                    break
    except RunError:  # every client failed
        loss = None
    finite = loss if loss is not None and math.isfinite(loss) else None
    return LadderStep(size, learning_rate, finite, finite is None or finite > DIVERGED_LOSS * start)
