"""A site of a federation: its own examples, its own copy of the base model, the adapter that the server describes.

In a simulation one process plays several sites, which then share the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sfedlora.config import RunConfig
from sfedlora.data.encoded import EncodedData
from sfedlora.data.splits import ClientSplit, split_client
from sfedlora.federation.state import Federation
from sfedlora.lora.base_model import BaseModel
from sfedlora.lora.inject import adapt
from sfedlora.methods import Method, make_method
from sfedlora.setup.build import build_federation
from sfedlora.setup.dataset import deal_examples, encode_examples, load_source
from sfedlora.setup.model import load_model
from sfedlora.setup.resolve import resolve_device, resolve_rules
from sfedlora.setup.server import site_label_names
from sfedlora.types import LoraSizes

__all__ = ["SiteData", "adapt_site", "load_site"]


@dataclass(frozen=True)
class SiteData:
    """What a site has before the server says anything.

    Attributes:
        config: the federation's configuration, with the site's own paths and columns.
        method: the method.
        base: the base model, not adapted yet.
        data: encoded examples.
        splits: client id -> split of its examples; one client, or all of a simulation.
        num_sites: clients that the federation is meant to have.
    """

    config: RunConfig
    method: Method
    base: BaseModel
    data: EncodedData
    splits: Mapping[str, ClientSplit]
    num_sites: int


def load_site(config: RunConfig, client_id: str | None) -> SiteData:
    """Load a site's examples and the base model.

    Args:
        config: with the site's own source and columns.
        client_id: the site's name; all rows are its own. None: a simulation, whose clients the partition makes.

    Raises:
        InputError: they cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    method = make_method(config.method.name, config.method.head)
    examples = load_source(config, config.data.source)
    label_names = site_label_names(config)
    base = load_model(config, resolve_device(config.device), label_names)
    data = encode_examples(config, examples, base, label_names)
    if client_id is None:
        splits = deal_examples(config, examples, data)
        return SiteData(config, method, base, data, splits, len(splits))
    groups = examples.column(config.data.group) if config.data.group is not None else None
    own = split_client(
        range(len(data)), fractions=config.data.split, client_id=client_id, seed=config.seed, groups=groups
    )
    num_sites = len(config.flower.sites or ()) or config.partition.num_clients or 1
    return SiteData(config, method, base, data, {client_id: own}, num_sites)


def adapt_site(site: SiteData, *, sizes: LoraSizes) -> Federation:
    """The site's clients as a federation, with the adapter that the server describes.

    The base model of `site` is changed in place; load it again for another rank.

    Args:
        site: the site.
        sizes: `server` is the site's own rank and gamma, `draw_rank` the rank of random draws.

    Raises:
        InputError: model and configuration do not fit together.
    """
    config = site.config
    resident = adapt(
        site.base.model,
        target_modules=config.lora.target_modules,
        rank=sizes.server.rank,
        dropout=config.lora.dropout,
        head_modules=site.base.new_modules,
    )
    if config.model.gradient_checkpointing:
        resident.enable_gradient_checkpointing()
    rules = resolve_rules(config, site.method, num_clients=site.num_sites)
    return build_federation(
        config.with_values({**rules, "runner": "serial", "clients_per_batch": 1, "workers": 1}),
        site.method,
        resident=resident,
        base=site.base,
        data=site.data,
        splits=site.splits,
        external={},
        initial=resident.read(),
        sizes=sizes,
        effective_clients=1.0,
    )
