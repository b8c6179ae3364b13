"""The server of a federation across sites, from its configuration to its summary.

It has neither base weights nor examples nor any B. Its run directory is a local run's, with the shared part only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sfedlora.artifacts import Checkpoint, RunDirectory, newest_intact, with_kept_best
from sfedlora.config import RunConfig
from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import ConfigError
from sfedlora.experiment import FLOWER
from sfedlora.experiment import config_digest as run_digest
from sfedlora.flower.exchange import Exchange
from sfedlora.flower.protocol import PROTOCOL, HelloRequest, config_digest, seal
from sfedlora.flower.rounds import Rounds, first_checkpoint
from sfedlora.flower.sites import Log, SiteRecord, Sites
from sfedlora.lora.base_model import Skeleton
from sfedlora.setup.environment import environment_record
from sfedlora.setup.server import (
    PreparedServer,
    load_server_model,
    prepare_server,
    require_deployable,
    without_initial_shared,
)

__all__ = ["serve"]


def serve(config: RunConfig, exchange: Exchange, *, resume: bool, log: Log) -> RunDirectory:
    """Run a federation to its end.

    Args:
        config: as the app has it.
        exchange: the transport.
        resume: go on in the run directory of the configuration, after its last complete round.
        log: takes one line of text.

    Returns:
        The run directory, with its summary.

    Raises:
        InputError: the configuration cannot be used, or the directory holds no run to resume.
        RunError: too few sites reported or answered; the run can be resumed.
    """
    require_deployable(config)
    output = Path(config.output)
    if not resume:
        RunDirectory.check_free(output)
    elif (finished := RunDirectory.open(output)).summary():
        finished.remove_stale_owner()
        log(f"{output}: the run is finished already")
        return finished
    skeleton = load_server_model(config)
    sites = _sites(config, skeleton, exchange, log)
    with ExitStack() as stack:
        begin = _resumed if resume else _begun
        rounds = begin(config, skeleton, sites, stack, log)
        rounds.run()
        rounds.finish()
    log(f"finished; {output} holds the shared part, each site its own adapter")
    return RunDirectory.open(output)


def _begun(config: RunConfig, skeleton: Skeleton, sites: Sites, stack: ExitStack, log: Log) -> Rounds:
    """A new run, with the sites that it begins with."""
    expected = len(config.flower.sites or ()) or config.partition.num_clients or 1
    _wait(config, sites, expected)
    first = dict(list(sites.known.items())[:expected])  # others that reported at the same moment join later
    counts = {client_id: site.num_examples for client_id, site in first.items()}
    server = prepare_server(config, skeleton, counts)
    fixed = _environment(server, first), _partition(first)
    directory = stack.enter_context(RunDirectory.created(Path(config.output), server.config, *fixed))
    return _rounds(server, sites, directory, first_checkpoint(server), stack, log)


def _resumed(config: RunConfig, skeleton: Skeleton, sites: Sites, stack: ExitStack, log: Log) -> Rounds:
    """A run as its newest intact checkpoint left it."""
    directory = RunDirectory.open(Path(config.output))
    stack.enter_context(directory.owned())
    server, checkpoint = _take_up(config, skeleton, directory, sites)
    log(f"{directory.path}: going on after round {checkpoint.state.server.round_num}")
    _wait(config, sites, len(sites.known))
    return _rounds(server, sites, directory, checkpoint, stack, log)


def _rounds(  # noqa: PLR0917 - what a run consists of
    server: PreparedServer,
    sites: Sites,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    stack: ExitStack,
    log: Log,
) -> Rounds:
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sfedlora-")))
    return Rounds(without_initial_shared(server), sites, directory, checkpoint, scratch=scratch, log=log)


def _sites(config: RunConfig, skeleton: Skeleton, exchange: Exchange, log: Log) -> Sites:
    hello = HelloRequest(
        protocol=PROTOCOL, federation_id=config.flower.federation_id or "", config_sha256=config_digest(config)
    )
    allowed = None if config.flower.sites is None else frozenset(config.flower.sites)
    return Sites(exchange, seal(hello), base_sha256=skeleton.sha256, allowed=allowed, log=log)


def _wait(config: RunConfig, sites: Sites, num_sites: int) -> None:
    """Until the sites that the federation begins with are connected; with secure sums its sites never change."""
    sites.wait_for(
        num_sites,
        enough=num_sites if config.flower.secure_sum else min(config.flower.min_replies, num_sites),
        seconds=config.flower.join_deadline_seconds,
    )


def _environment(server: PreparedServer, known: Mapping[str, SiteRecord]) -> dict[str, Any]:
    """Content of environment.json."""
    sizes = server.rules.sizes
    environment = environment_record(server.config, server.skeleton, server.formed, server.scaling_clients, sizes)
    return environment | {
        "config_sha256": run_digest(server.config.model_dump(mode="json")),
        "external_sha256": {},
        FLOWER: {"protocol": PROTOCOL, "sites": {client_id: site.plain() for client_id, site in known.items()}},
    }


def _partition(known: Mapping[str, SiteRecord]) -> dict[str, Any]:
    """Content of partition.json: which rows a site has is not known here."""
    clients = {
        client_id: {"dir": safe_directory_name(client_id), "num_examples": site.num_examples}
        for client_id, site in sorted(known.items())
    }
    return {"source_sha256": "", "clients": clients}


def _take_up(
    config: RunConfig, skeleton: Skeleton, directory: RunDirectory, sites: Sites
) -> tuple[PreparedServer, Checkpoint]:
    """The run as its newest intact checkpoint left it; its sites become known."""
    output = directory.path
    directory.check_usable()
    environment = directory.environment()
    if FLOWER not in environment:
        raise ConfigError(f"output: {output} holds a run of this machine; go on with `sfedlora resume {output}`")
    counts = {client_id: int(one["num_examples"]) for client_id, one in directory.partition()["clients"].items()}
    server = prepare_server(config, skeleton, counts)
    if environment.get("config_sha256") != run_digest(server.config.model_dump(mode="json")):
        raise ConfigError(f"{output}: the run began with another configuration; put it back, or choose another output")
    if environment["base_model"]["sha256"] != skeleton.sha256:
        raise ConfigError(f"model.source: {config.model.source} has other weights than when the run began")
    recovered = newest_intact(directory.checkpoints)
    for round_num in recovered.damaged:
        directory.checkpoints.remove(round_num)
    directory.remove_leftovers()
    checkpoint = recovered.checkpoint or first_checkpoint(server)
    known = checkpoint.progress.get("sites") or {key: {"num_examples": count} for key, count in counts.items()}
    for client_id, facts in known.items():
        sites.known[client_id] = SiteRecord(facts["num_examples"], accepted_round=facts.get("accepted_round", 0))
    num_complete = checkpoint.state.server.round_num - (checkpoint.progress["pending"] is not None)
    directory.drop_metrics_after(num_complete)
    directory.require_metrics_to(num_complete)
    return server, with_kept_best(checkpoint, recovered.kept, directory.metrics())
