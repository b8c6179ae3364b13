"""One site of a federation: its own examples, its own copy of the base model, the adapter that the server describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfedlora.config import RunConfig
from sfedlora.data.encoded import EncodedData
from sfedlora.data.splits import ClientSplit, split_client
from sfedlora.errors import ConfigError
from sfedlora.federation.state import Federation
from sfedlora.lora.base_model import BaseModel, load_base_model
from sfedlora.lora.inject import adapt
from sfedlora.methods import Method, make_method
from sfedlora.seeds import derive_seed
from sfedlora.setup.build import build_federation
from sfedlora.setup.dataset import deal_examples, encode_examples, load_source
from sfedlora.setup.resolve import resolve_device, resolve_rules
from sfedlora.setup.server import site_label_names
from sfedlora.types import LoraSizes, Tensors

__all__ = ["SiteData", "adapt_site", "load_site"]


@dataclass(frozen=True)
class SiteData:
    """What a site has before the server says anything.

    Attributes:
        client_id: its name.
        config: the federation's configuration, with the site's own paths and columns.
        method: the method.
        base: the base model, not adapted yet.
        data: the site's encoded examples.
        split: their split.
        num_sites: clients that the federation is meant to have.
    """

    client_id: str
    config: RunConfig
    method: Method
    base: BaseModel
    data: EncodedData
    split: ClientSplit
    num_sites: int


def load_site(config: RunConfig, client_id: str | int, *, simulated: bool = False) -> SiteData:
    """Load a site's examples and the base model.

    Args:
        config: with the site's own source and columns.
        client_id: the site's name; in a simulation the position of its client, in client-id order.
        simulated: the site is one client of a partition of the source; otherwise all rows are its own.

    Raises:
        InputError: they cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.model.matmul_precision)
    method = make_method(config.method.name, config.method.head)
    examples = load_source(config, config.data.source)
    label_names = site_label_names(config)
    base = load_base_model(
        config.model.source,
        task=config.model.task,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=str(resolve_device(config.device)),
        num_labels=len(label_names) or None,
        label_names=label_names or None,
        seed=derive_seed(config.seed, "new_weights"),
    )
    data = encode_examples(config, examples, base, label_names)
    num_sites = len(config.flower.sites or ()) or config.partition.num_clients or 1
    if simulated:
        splits = deal_examples(config, examples, data)
        client_id, num_sites = _chosen(sorted(splits), client_id), len(splits)
        split = splits[client_id]
    else:
        groups = examples.column(config.data.group) if config.data.group is not None else None
        client_id = str(client_id)
        split = split_client(
            range(len(data)), fractions=config.data.split, client_id=client_id, seed=config.seed, groups=groups
        )
    return SiteData(client_id, config, method, base, data, split, num_sites)


def adapt_site(site: SiteData, *, sizes: LoraSizes, initial: Tensors) -> Federation:
    """The site as a federation of one client, with the adapter that the server describes.

    The base model of `site` is changed in place; load it again for another rank.

    Args:
        site: the site.
        sizes: `server` is the site's own rank and gamma, `draw_rank` the rank of random draws.
        initial: factors that the site starts from and the server does not send every round (a head).

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
        splits={site.client_id: site.split},
        external={},
        initial={**resident.read(), **initial},
        sizes=sizes,
        effective_clients=1.0,
    )


def _chosen(client_ids: list[str], position: str | int) -> str:
    if isinstance(position, str):
        return position
    if position >= len(client_ids):
        raise ConfigError(
            f"simulated node {position} has no client: the partition makes {len(client_ids)}; start num-supernodes="
            f"{len(client_ids)}"
        )
    return client_ids[position]
