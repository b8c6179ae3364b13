"""The server's side of a federation across sites: everything but base weights and examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.federation.initialize import InitialA, Initialization
from sfedlora.federation.server_step import ServerRules
from sfedlora.federation.state import RoundSettings, rules_of
from sfedlora.lora.base_model import Skeleton, load_skeleton
from sfedlora.methods import make_method
from sfedlora.seeds import derive_seed
from sfedlora.setup.adapter import (
    chosen_init,
    client_ranks,
    draw_initial_a,
    initial_adapter,
    lora_sizes,
    require_ranks,
    scaling_clients,
)
from sfedlora.setup.build import round_settings
from sfedlora.setup.resolve import resolve_rules
from sfedlora.types import Part, Tensors, select_parts

__all__ = [
    "PreparedServer",
    "load_server_model",
    "prepare_server",
    "require_deployable",
    "site_label_names",
    "without_initial_shared",
]


@dataclass(frozen=True)
class PreparedServer:
    """A server ready for round 1.

    Attributes:
        config: the configuration with every `auto` that concerns the federation resolved.
        skeleton: the base model without its weights.
        rules: what a server step needs.
        rounds: how rounds are run.
        initial: the complete adapter before round 1.
        formed: how its A was formed.
        init: how A was initialised.
        scaling_clients: the N that enters the sfed rule.
    """

    config: RunConfig
    skeleton: Skeleton
    rules: ServerRules
    rounds: RoundSettings
    initial: Tensors
    formed: InitialA
    init: Initialization
    scaling_clients: float


def require_deployable(config: RunConfig) -> None:
    """Refuse what cannot run across sites.

    Raises:
        ConfigError: the message names the key and what to give instead.
    """
    if make_method(config.method.name, config.method.head).traits.pools_data:
        raise ConfigError(f"method.name: {config.method.name} pools all data in one place; choose another across sites")
    if config.model.task == "sequence-classification" and config.data.labels is None:
        raise ConfigError(
            "data.labels: sites must agree on the ids of the labels; list the label values, for example "
            "data.labels: [negative, neutral, positive]"
        )
    for split in ("validation", "test"):
        if getattr(config.data, split) is not None:
            raise ConfigError(
                f"data.{split}: a further file is evaluated in local runs only; leave it out across sites"
            )
    if config.flower.federation_id is None:
        raise ConfigError("flower.federation_id: needed to keep a site's state; `sfedlora flower init` writes one")
    if config.flower.sites is None and config.partition.num_clients is None:
        raise ConfigError("flower.sites: list the client ids of the sites, or give their number, partition.num_clients")
    sites = config.flower.sites or ()
    if len(set(sites)) < len(sites):
        raise ConfigError(f"flower.sites: a client id stands twice in {list(sites)}")
    if sites and config.flower.min_replies > len(sites):
        raise ConfigError(
            f"flower.min_replies: {config.flower.min_replies} of {len(sites)} sites; give at most as many"
        )


def site_label_names(config: RunConfig) -> tuple[str, ...]:
    """Names of the classes in the order of their ids; empty for causal-lm."""
    return tuple(map(str, config.data.labels or ())) if config.model.task == "sequence-classification" else ()


def load_server_model(config: RunConfig) -> Skeleton:
    """The base model as far as a server needs it.

    Raises:
        InputError: it cannot be used.
    """
    return load_skeleton(
        config.model.source,
        task=config.model.task,
        target_modules=config.lora.target_modules,
        dtype=config.model.dtype,
        label_names=site_label_names(config) or None,
        seed=derive_seed(config.seed, "new_weights"),
    )


def prepare_server(config: RunConfig, skeleton: Skeleton, num_examples: Mapping[str, int]) -> PreparedServer:
    """Form A and fix gamma for the sites that a federation begins with.

    Args:
        config: checked by `require_deployable`.
        skeleton: the base model.
        num_examples: client id -> training examples, as the sites report them.

    Raises:
        InputError: number of sites, ranks and model do not fit together.
    """
    method = make_method(config.method.name, config.method.head)
    resolved = config.with_values(
        {
            **resolve_rules(config, method, num_clients=len(num_examples)),
            "runner": "serial",
            "clients_per_batch": 1,
            "workers": 1,
        }
    )
    ranks = client_ranks(resolved, sorted(num_examples))
    if method.traits.caps_rank:
        require_ranks(skeleton.layout.targets, max(ranks.values()), config.method.name)
    rank = max(ranks.values())
    formed = draw_initial_a(resolved, method, num_examples, skeleton.layout, rank)
    num_scaling_clients = scaling_clients(resolved, method, formed, len(num_examples))
    sizes = lora_sizes(resolved, ranks, num_scaling_clients)
    rounds = round_settings(resolved, method, num_examples, local_steps=resolved.local.local_steps)
    return PreparedServer(
        config=resolved,
        skeleton=skeleton,
        rules=rules_of(method, sizes, rounds),
        rounds=rounds,
        initial=initial_adapter(skeleton.layout, formed, skeleton.head, rank),
        formed=formed,
        init=chosen_init(resolved),
        scaling_clients=num_scaling_clients,
    )


def without_initial_shared(server: PreparedServer) -> PreparedServer:
    """A server whose first state exists, and holds what is shared: the initial values of that are not kept as well.

    Of a personal B, which is zero here, the shape stays and a single zero.
    """
    kept = select_parts(server.initial, server.rules.method.personal_parts())
    zeros = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in select_parts(kept, [Part.B]).items()}
    return replace(server, initial={**kept, **zeros}, formed=replace(server.formed, tensors={}))
