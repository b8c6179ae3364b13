"""The adapter before round 1 and the N of the sfed rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.federation.initialize import MAX_DRAWN_CLIENTS, InitialA, Initialization, form_initial_a
from sfedlora.federation.sampling import sample_cohort
from sfedlora.lora.scaling import scaling_factor
from sfedlora.methods import Method, client_weights
from sfedlora.seeds import numpy_generator
from sfedlora.types import AdapterLayout, LoraSize, LoraSizes, Part, Target, Tensors

__all__ = [
    "chosen_init",
    "client_ranks",
    "draw_initial_a",
    "initial_adapter",
    "lora_sizes",
    "require_ranks",
    "scaling_clients",
]

TOLERATED_COUNT_ERROR = 0.2


def client_ranks(config: RunConfig, client_ids: Sequence[str]) -> dict[str, int]:
    """The rank of every client.

    Raises:
        ConfigError: a list of another length than there are clients.
    """
    rank = config.lora.rank
    if isinstance(rank, int):
        return dict.fromkeys(client_ids, rank)
    if config.lora.rank_assignment == "drawn":
        return {
            client_id: rank[int(numpy_generator(config.seed, "rank", client_id).integers(len(rank)))]
            for client_id in client_ids
        }
    ordered = sorted(client_ids, key=_by_number)
    if len(rank) != len(ordered):
        shown = ", ".join(ordered[:8]) + (", ..." if len(ordered) > 8 else "")
        raise ConfigError(
            f"lora.rank: {len(rank)} ranks for {len(ordered)} clients; give one for each, in the order {shown}, or "
            "lora.rank_assignment: drawn"
        )
    return dict(zip(ordered, rank, strict=True))


def _by_number(client_id: str) -> tuple[int, str]:
    """Numbered clients in the order of their numbers, others by name."""
    return (int(client_id) if client_id.isdecimal() else -1, client_id)


def lora_sizes(config: RunConfig, ranks: Mapping[str, int], num_scaling_clients: float) -> LoraSizes:
    """Rank and gamma of the shared factors, which have the largest rank, and of every client's where ranks differ."""

    def size(rank: int) -> LoraSize:
        rule, alpha = config.lora.scaling, config.lora.alpha
        return LoraSize(rank, scaling_factor(rule, alpha=alpha, rank=rank, num_clients=num_scaling_clients))

    different = len(set(ranks.values())) > 1
    clients = {client_id: size(rank) for client_id, rank in ranks.items()} if different else {}
    return LoraSizes(size(max(ranks.values())), clients)


def require_ranks(targets: Sequence[Target], rank: int, method: str) -> None:
    """Refuse a rank that a module's delta weight cannot have.

    Raises:
        ConfigError: the rank is above min(in_features, out_features) of a module.
    """
    tightest = min(targets, key=lambda target: min(target.in_features, target.out_features))
    limit = min(tightest.in_features, tightest.out_features)
    if rank > limit:
        raise ConfigError(
            f"lora.rank: {rank} is above min(in_features, out_features) = {limit} of {tightest.path}, and method "
            f"{method!r} cuts an SVD to the rank; use at most {limit}, or other target modules"
        )


def draw_initial_a(
    config: RunConfig, method: Method, num_examples: Mapping[str, int], layout: AdapterLayout, rank: int
) -> InitialA:
    """A before round 1. Methods that average nothing at the start get one draw (and `local` clients their own).

    Args:
        config: resolved.
        method: the method.
        num_examples: client id -> training examples, of the clients that the run begins with.
        layout: the adapted modules.
        rank: of the shared factors.
    """
    weights = _averaging_weights(config, num_examples)
    init: Initialization = chosen_init(config) if method.traits.averages_a else "shared"
    initial = form_initial_a(layout, rank, weights=weights, init=init, seed=config.seed)
    measured, intended = initial.measured_clients, initial.averaged_clients
    if measured is not None and abs(measured / intended - 1.0) > TOLERATED_COUNT_ERROR:
        warnings.warn(
            f"the draws behave like {measured:.2f} effective clients, {intended:.2f} were intended; "
            "the adapters are small or the draws are not independent",
            stacklevel=2,
        )
    if init != "shared" and len(weights) > MAX_DRAWN_CLIENTS:
        warnings.warn(
            f"{len(weights)} clients: A is drawn from the law of the mean of their draws, not draw by draw, so the "
            "effective number of clients is not measured",
            stacklevel=2,
        )
    return initial


def scaling_clients(config: RunConfig, method: Method, initial: InitialA, num_clients: int) -> float:
    """The N of the sfed rule; warns where sfed over-amplifies or is rslora in disguise."""
    chosen = config.lora.num_clients
    count = initial.effective_clients if chosen == "effective" else float(num_clients if chosen == "total" else chosen)
    if config.lora.scaling != "sfed" or initial.effective_clients > 1.0 or num_clients == 1:
        return count
    formed = f"lora.init: {config.lora.init}, method {config.method.name}: A is not the average of independent draws"
    if count > 1.0:
        warnings.warn(
            f"{formed}, so its variance is not divided by N and scaling sfed with N = {count:g} makes gamma "
            f"sqrt({count:g}) times too large; use lora.init: independent or lora.num_clients: effective",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"{formed}, so the effective number of clients is 1 and scaling sfed equals rslora here; "
            + ("use lora.init: independent for SFed-LoRA" if method.traits.averages_a else "say rslora, which it is"),
            stacklevel=2,
        )
    return count


def initial_adapter(layout: AdapterLayout, initial: InitialA, head: Tensors, rank: int) -> dict[str, Tensor]:
    """A as formed, B zero, a head."""
    zeros = {name: torch.zeros(shape) for name, shape in layout.shapes(rank, [Part.B]).items()}
    return {**initial.tensors, **zeros, **head}


def chosen_init(config: RunConfig) -> Initialization:
    """The initialisation of a resolved configuration."""
    if config.lora.init == "auto":
        raise ConfigError("lora.init: auto was not resolved")
    return config.lora.init


def _averaging_weights(config: RunConfig, num_examples: Mapping[str, int]) -> dict[str, float]:
    """Weights of the average that formed A: over all clients, for `local` over the cohort of round 1."""
    members: Sequence[str] = sorted(num_examples)
    if config.lora.init == "local":
        members = sample_cohort(members, config.rounds.cohort_size, seed=config.seed, round_num=1)
    counts = {client_id: num_examples[client_id] for client_id in members}
    return client_weights(counts, config.rounds.weighting)
