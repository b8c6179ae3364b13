"""The server of a federation across sites: the rounds of a local run, with the sites' answers in place of a runner.

    round t + 1   ask: evaluate what the server had after round t with your B, train from it, send what is shared
    in the end    ask: evaluate the last state, and the best one

So every node gets one message per round, and the evaluation of round t comes with the answers of round t + 1. The
server has neither base weights nor examples nor any B; its run directory holds the shared part of a local run's.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sfedlora.artifacts import Checkpoint, CheckpointWriter, RunDirectory, adapter_facts, write_served
from sfedlora.config import RunConfig
from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import ConfigError, RunError
from sfedlora.experiment import config_digest as run_digest
from sfedlora.experiment import with_best
from sfedlora.federation.client import ClientOutcome, TrainMetrics
from sfedlora.federation.evaluate import EvalResult, mean_results
from sfedlora.federation.record import client_records, evaluation_record, scaling_record, training_record
from sfedlora.federation.round import SCHEMA_VERSION
from sfedlora.federation.sampling import choose_evaluated, sample_cohort
from sfedlora.federation.server_step import accept_updates, server_step
from sfedlora.federation.spool import Spool
from sfedlora.federation.state import FederationState
from sfedlora.flower.exchange import Exchange, Lost
from sfedlora.flower.protocol import (
    PROTOCOL,
    Envelope,
    HelloRequest,
    MessageError,
    RoundReply,
    RoundRequest,
    config_digest,
    open_facts,
    open_failure,
    open_tensors,
    seal,
)
from sfedlora.flower.site import EXTRA, INITIAL, SHARED
from sfedlora.flower.sites import Log, SiteRecord, Sites
from sfedlora.lora.base_delta import select_deltas
from sfedlora.lora.scaling import effective_clients
from sfedlora.methods import client_factors, client_weights
from sfedlora.setup.environment import environment_record
from sfedlora.setup.server import PreparedServer, load_server_model, prepare_server, require_deployable
from sfedlora.types import Part, ServerState, Tensors, Update, select_parts

__all__ = ["serve"]


@dataclass(frozen=True)
class _Answers:
    """What the sites answered in one round.

    Attributes:
        replies: client id -> its reply.
        updates: client id -> its factors, on disk until they are read.
        failed: client id -> why there is no usable reply.
        bytes_up, bytes_down: of factors.
    """

    replies: Mapping[str, RoundReply]
    updates: Mapping[str, Tensors]
    failed: Mapping[str, str]
    bytes_up: int
    bytes_down: int


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
    if resume:
        directory = RunDirectory.open(output)
        if directory.summary():
            log(f"{output}: the run is finished already")
            return directory
    else:
        RunDirectory.check_free(output)
    skeleton = load_server_model(config)
    sites = Sites(
        exchange,
        seal(
            HelloRequest(
                protocol=PROTOCOL,
                federation_id=config.flower.federation_id or "",
                config_sha256=config_digest(config),
            )
        ),
        base_sha256=skeleton.sha256,
        allowed=None if config.flower.sites is None else frozenset(config.flower.sites),
        log=log,
    )
    if resume:
        server, directory, checkpoint = _take_up(config, output, sites)
        log(f"{output}: going on after round {checkpoint.state.server.round_num}")
        _wait(config, sites, len(sites.known))
    else:
        _wait(config, sites, len(config.flower.sites or ()) or (config.partition.num_clients or 1))
        num_examples = {client_id: site.num_examples for client_id, site in sites.known.items()}
        server = prepare_server(config, skeleton, num_examples)
        directory = _create(output, server, sites.known)
        checkpoint = _first(server)
    with tempfile.TemporaryDirectory(prefix="sfedlora-") as scratch:
        rounds = _Rounds(server, sites, directory, Path(scratch), log)
        checkpoint = rounds.run(checkpoint)
        rounds.finish(checkpoint)
    return directory


def _wait(config: RunConfig, sites: Sites, num_sites: int) -> None:
    """Until the sites that the federation begins with are connected."""
    sites.wait_for(
        lambda: len(sites.connected()) >= num_sites,
        enough=min(config.flower.min_replies, num_sites),
        seconds=config.flower.join_deadline_seconds,
    )


def _create(output: Path, server: PreparedServer, known: Mapping[str, SiteRecord]) -> RunDirectory:
    """The run directory, with what is fixed before round 1."""
    environment = environment_record(
        server.config, server.skeleton, server.formed, server.scaling_clients, server.rules.sizes
    )
    environment |= {
        "config_sha256": run_digest(server.config),
        "external_sha256": {},
        "flower": {"protocol": PROTOCOL, "sites": {client_id: site.plain() for client_id, site in known.items()}},
    }
    clients = {
        client_id: {"dir": safe_directory_name(client_id), "num_examples": site.num_examples}
        for client_id, site in sorted(known.items())
    }
    return RunDirectory.create(output, server.config, environment, {"source_sha256": "", "clients": clients})


def _first(server: PreparedServer) -> Checkpoint:
    parts = frozenset(Part) - server.rules.method.personal_parts()
    state = ServerState(0, select_parts(server.initial, parts), {})
    progress = {"best_round": None, "best_loss": None, "initial": None, "pending": None, "best_accepted": {}}
    return Checkpoint(FederationState(state, {}, {}), progress)


def _take_up(config: RunConfig, output: Path, sites: Sites) -> tuple[PreparedServer, RunDirectory, Checkpoint]:
    """The run as its last complete round left it."""
    directory = RunDirectory.open(output)
    environment = directory.environment()
    if "flower" not in environment:
        raise ConfigError(f"output: {output} holds a run of this machine; go on with `sfedlora resume {output}`")
    counts = {client_id: int(one["num_examples"]) for client_id, one in directory.partition()["clients"].items()}
    server = prepare_server(config, load_server_model(config), counts)
    if environment.get("config_sha256") != run_digest(server.config):
        raise ConfigError(f"{output}: the run began with another configuration; put it back, or choose another output")
    if environment["base_model"]["sha256"] != server.skeleton.sha256:
        raise ConfigError(f"model.source: {config.model.source} has other weights than when the run began")
    directory.remove_leftovers()
    rounds = directory.checkpoints.rounds()
    checkpoint = directory.checkpoints.load(rounds[-1]) if rounds else _first(server)
    recorded = checkpoint.progress.get("sites") or {key: {"num_examples": count} for key, count in counts.items()}
    for client_id, facts in recorded.items():
        sites.known[client_id] = SiteRecord(facts["num_examples"], "", {}, facts.get("accepted_round", 0))
    pending = checkpoint.progress.get("pending")
    directory.drop_metrics_after(checkpoint.state.server.round_num - (pending is not None))
    return server, directory, checkpoint


class _Rounds:
    """Owner of a run while it runs: its directory, its sites, its scratch folder."""

    def __init__(self, server: PreparedServer, sites: Sites, directory: RunDirectory, scratch: Path, log: Log) -> None:
        self._server, self._sites, self._directory, self._scratch, self._log = server, sites, directory, scratch, log
        self._flower = server.config.flower
        self._writer = CheckpointWriter(directory.checkpoints)

    def run(self, checkpoint: Checkpoint) -> Checkpoint:
        """Run the rounds after a checkpoint."""
        while checkpoint.state.server.round_num < self._server.rounds.num_rounds:
            with Spool(self._scratch) as spool:
                checkpoint = self._round(checkpoint, spool)
            self._writer.save(checkpoint, changed=(), best_round=checkpoint.progress["best_round"] or 0)
        return checkpoint

    def finish(self, checkpoint: Checkpoint) -> None:
        """Evaluate the last and the best state, have the adapters written, write the summary."""
        state, progress = checkpoint.state.server, checkpoint.progress
        accepted = {client_id: site.accepted_round for client_id, site in self._sites.known.items()}
        last = self._ask_evaluation(state, accepted, progress, write_adapter=True)
        progress = self._complete(progress, last["validation"])
        write_served(
            self._directory.adapter_path(None),
            {**self._server.initial, **state.shared},
            state.extra,
            self._server.rules.sizes.server,
            adapter_facts(
                self._server.config,
                layout=self._server.skeleton.layout,
                target_suffixes=self._server.skeleton.target_suffixes,
                base_model_name=self._server.skeleton.name_or_path,
                scaling_clients=self._server.scaling_clients,
            ),
        )
        best_round = progress["best_round"]
        best = last
        if best_round is not None and best_round != state.round_num:
            before = self._directory.checkpoints.load(best_round).state.server
            best = self._ask_evaluation(before, progress["best_accepted"], progress)
        self._directory.write_summary(
            {
                "initial": progress["initial"],
                "last": {"round_num": state.round_num, **_means_by_split(last)},
                "best": {"round_num": best_round or state.round_num, **_means_by_split(best)},
                "store_bytes": 0,
            }
        )
        self._log(f"finished; {self._directory.path} holds the shared part, each site its own adapter")

    def _round(self, checkpoint: Checkpoint, spool: Spool) -> Checkpoint:
        """The round after a checkpoint."""
        state, progress, settings = checkpoint.state.server, checkpoint.progress, self._server.rounds
        round_num = state.round_num + 1
        accepted = {client_id: site.accepted_round for client_id, site in self._sites.known.items()}
        cohort = self._cohort(round_num)
        evaluated = self._evaluated(state.round_num)
        splits = ["validation", "test"] if state.round_num == 0 else ["validation"]
        clock = time.perf_counter()
        answers = self._ask(
            state,
            accepted,
            progress,
            {
                client_id: (splits if client_id in evaluated else [], client_id in cohort)
                for client_id in sorted({*cohort, *evaluated})
            },
            spool,
        )
        results = {split: _results(answers.replies, split) for split in splits}
        if state.round_num == 0:
            progress = {**progress, "initial": _means_by_split(results)}
        else:
            progress = self._complete(progress, results["validation"])
        train_seconds = time.perf_counter() - clock
        clock = time.perf_counter()
        excluded = {key: reason for key, reason in answers.failed.items() if key in cohort}
        updates = [
            Update(client_id, round_num, self._sites.known[client_id].num_examples, answers.updates[client_id])
            for client_id in sorted(answers.updates)
        ]
        usable, refused = accept_updates(self._server.rules, state, updates)
        excluded |= refused
        self._require_enough(round_num, len(usable), excluded)
        after = server_step(self._server.rules, state, usable, excluded)
        for update in usable:
            self._sites.accept(update.client_id, round_num)
        seconds = {"train_seconds": train_seconds, "aggregate_seconds": time.perf_counter() - clock}
        record = self._record(round_num, cohort, answers, usable, excluded) | seconds
        known = {client_id: site.plain() for client_id, site in sorted(self._sites.known.items())}
        progress = {**progress, "pending": record, "sites": known, "accepted": self._accepted()}
        self._log(_describe(record, settings.num_rounds))
        return Checkpoint(FederationState(after, {}, {}), progress)

    def _accepted(self) -> dict[str, int]:
        return {client_id: site.accepted_round for client_id, site in sorted(self._sites.known.items())}

    def _cohort(self, round_num: int) -> tuple[str, ...]:
        everybody, settings = list(self._sites.known), self._server.rounds
        return sample_cohort(everybody, settings.cohort_size, seed=self._server.config.seed, round_num=round_num)

    def _evaluated(self, round_num: int) -> tuple[str, ...]:
        """Who is evaluated with the state after a round."""
        settings = self._server.rounds
        if round_num % settings.evaluate_every and round_num != settings.num_rounds:
            return ()
        cohort = self._cohort(max(1, round_num))
        return choose_evaluated(list(self._sites.known), settings.evaluated, cohort, seed=self._server.config.seed)

    def _ask(
        self,
        state: ServerState,
        accepted: Mapping[str, int],
        progress: Mapping[str, Any],
        tasks: Mapping[str, tuple[Sequence[str], bool]],
        spool: Spool,
        *,
        write_adapter: bool = False,
    ) -> _Answers:
        """Ask clients to evaluate splits and, where the second value says so, to train."""
        requests = {
            client_id: self._request(state, client_id, accepted.get(client_id, 0), progress, *task, write_adapter)
            for client_id, task in tasks.items()
        }
        replies: dict[str, RoundReply] = {}
        updates: dict[str, Tensors] = {}
        failed: dict[str, str] = {}
        bytes_up = 0
        for client_id, answer in self._sites.ask(requests, seconds=self._flower.round_deadline_seconds):
            try:
                reply, tensors = self._open(state, client_id, answer, trained=tasks[client_id][1])
            except MessageError as error:
                failed[client_id] = str(error)
                self._log(f"round {state.round_num + 1}: site {client_id!r} is excluded: {error}")
                continue
            replies[client_id] = reply
            if reply.trained:
                bytes_up += len(answer.data) if isinstance(answer, Envelope) else 0
                updates[client_id] = spool.put(client_id, tensors)
        bytes_down = sum(len(request.data) for request in requests.values())
        return _Answers(replies, updates, failed, bytes_up, bytes_down)

    def _request(
        self,
        state: ServerState,
        client_id: str,
        personal_round: int,
        progress: Mapping[str, Any],
        splits: Sequence[Any],
        train: bool,
        write_adapter: bool,
    ) -> Envelope:
        rules, method = self._server.rules, self._server.rules.method
        size = rules.sizes.of(client_id)
        shared = client_factors(method, state.shared, server=rules.sizes.server, client=size)
        tensors = {SHARED + name: tensor for name, tensor in shared.items()}
        tensors |= {EXTRA + name: tensor for name, tensor in select_deltas(state.extra).items()}
        if personal_round == 0:
            own = select_parts(self._server.initial, method.personal_parts() - {Part.B})
            tensors |= {INITIAL + name: tensor for name, tensor in own.items()}
        request = RoundRequest(
            federation_id=self._flower.federation_id or "",
            client_id=client_id,
            round_num=state.round_num + 1,
            rank=size.rank,
            scaling=size.scaling,
            draw_rank=rules.sizes.server.rank,
            scaling_clients=self._server.scaling_clients,
            personal_round=personal_round,
            kept_rounds=sorted({int((progress.get("best_accepted") or {}).get(client_id, 0))} - {0}),
            evaluate=list(splits),
            train=train,
            write_adapter=write_adapter,
            metrics=self._flower.metrics != "none",
            wire_dtype=self._flower.wire_dtype,
        )
        return seal(request, tensors, dtype=self._flower.wire_dtype)

    def _open(
        self, state: ServerState, client_id: str, answer: Envelope | Lost, *, trained: bool
    ) -> tuple[RoundReply, Tensors]:
        """A checked reply and its factors.

        Raises:
            MessageError: it cannot be used.
        """
        if isinstance(answer, Lost):
            raise MessageError(answer.reason)
        failure = open_failure(answer)
        if failure is not None:
            if failure.code == "lost-state":
                self._sites.accept(client_id, 0)
            raise MessageError(f"the site failed with code {failure.code!r}; its own log says why")
        reply = open_facts(answer, RoundReply)
        if reply.client_id != client_id or reply.round_num != state.round_num + 1:
            raise MessageError(
                f"a reply of client {reply.client_id!r} for round {reply.round_num}; expected {client_id!r} and round "
                f"{state.round_num + 1}"
            )
        if reply.trained != trained:
            raise MessageError("the reply has an update, none was asked for" if reply.trained else "no update in it")
        if reply.num_examples != self._sites.known[client_id].num_examples:
            raise MessageError(
                f"states {reply.num_examples} training examples; it joined with "
                f"{self._sites.known[client_id].num_examples}"
            )
        return reply, open_tensors(answer, reply.layout, self._expected(client_id, state) if trained else {})

    def _expected(self, client_id: str, state: ServerState) -> dict[str, tuple[int, ...]]:
        """The factors that a client's update of the open round has."""
        rules = self._server.rules
        parts = rules.method.shared_parts(state.round_num + 1)
        return self._server.skeleton.layout.shapes(rules.sizes.of(client_id).rank, parts)

    def _ask_evaluation(
        self,
        state: ServerState,
        accepted: Mapping[str, int],
        progress: Mapping[str, Any],
        *,
        write_adapter: bool = False,
    ) -> dict[str, dict[str, EvalResult]]:
        """Split -> client id -> metrics of a state; with `write_adapter` every site also writes what it serves."""
        splits = ("validation", "test")
        evaluated = self._evaluated_in_the_end()
        asked = sorted(self._sites.known) if write_adapter else sorted(evaluated)
        tasks = {client_id: (splits if client_id in evaluated else (), False) for client_id in asked}
        with Spool(self._scratch) as spool:
            answers = self._ask(state, accepted, progress, tasks, spool, write_adapter=write_adapter)
        return {split: _results(answers.replies, split) for split in splits}

    def _evaluated_in_the_end(self) -> Collection[str]:
        return self._evaluated(self._server.rounds.num_rounds)

    def _complete(self, progress: Mapping[str, Any], results: Mapping[str, EvalResult]) -> dict[str, Any]:
        """Write the pending line of the last round, now that it is evaluated."""
        pending = progress.get("pending")
        if pending is None:
            return dict(progress)
        per_client = self._flower.metrics == "per-client"
        clients = {client_id: dict(one) for client_id, one in pending["clients"].items()}
        for client_id, result in results.items() if per_client else ():
            own = clients.setdefault(client_id, {"num_examples": self._sites.known[client_id].num_examples})
            own |= {"num_evaluated": result.num_examples, **result.metrics()}
        record = {
            **pending,
            **evaluation_record(results, self._server.config.model.task),
            "clients": dict(sorted(clients.items())),
        }
        self._directory.append_metrics(record)
        after = dict(with_best(progress, record))
        if after["best_round"] != progress["best_round"]:
            after["best_accepted"] = progress.get("accepted") or {}
        return {**after, "pending": None}

    def _require_enough(self, round_num: int, num_usable: int, excluded: Mapping[str, str]) -> None:
        if num_usable >= self._flower.min_replies:
            return
        reasons = "; ".join(f"{client_id}: {reason}" for client_id, reason in sorted(excluded.items()))
        raise RunError(
            f"round {round_num}: {num_usable} usable replies, flower.min_replies is {self._flower.min_replies} "
            f"({reasons}); mend the sites and go on with resume=true"
        )

    def _record(
        self,
        round_num: int,
        cohort: Sequence[str],
        answers: _Answers,
        usable: Sequence[Update],
        excluded: Mapping[str, str],
    ) -> dict[str, Any]:
        """The line of a round, as far as it is known before its evaluation."""
        config, sizes = self._server.config, self._server.rules.sizes
        outcomes = {update.client_id: _outcome(update, answers.replies[update.client_id]) for update in usable}
        measured = {key: outcome for key, outcome in outcomes.items() if outcome is not None}
        gains = [one.gain for key in measured if (one := answers.replies[key].measured) and one.gain is not None]
        weights = client_weights({one.client_id: one.num_examples for one in usable}, config.rounds.weighting)
        clients = client_records(measured, {}, {}) if self._flower.metrics == "per-client" else {}
        nothing = dict.fromkeys(("train_loss", "grad_norm_a", "grad_norm_b", "tokens", "padded_tokens"))
        return {
            "schema_version": SCHEMA_VERSION,
            "round_num": round_num,
            "cohort": list(cohort),
            **(training_record(measured) if measured else nothing),
            "gain": fmean(gains) if gains else None,
            "scaling": scaling_record(sizes, list(cohort)),
            "effective_clients": self._server.formed.effective_clients,
            "effective_cohort_size": effective_clients(list(weights.values())),
            "bytes_up": answers.bytes_up,
            "bytes_down": answers.bytes_down,
            "clients_per_batch": 1,
            "eval_seconds": None,
            "excluded": dict(sorted(excluded.items())),
            "clients": clients or {one.client_id: {"num_examples": one.num_examples} for one in usable},
        }


def _outcome(update: Update, reply: RoundReply) -> ClientOutcome | None:
    """What a site measured, as the local runner gives it."""
    one = reply.measured
    if one is None or one.train_loss is None:
        return None
    metrics = TrainMetrics(
        one.train_loss, one.grad_norm_a, one.grad_norm_b, one.tokens, one.padded_tokens, one.num_steps
    )
    return ClientOutcome(update.client_id, update.round_num, update.num_examples, {}, {}, metrics)


def _results(replies: Mapping[str, RoundReply], split: Any) -> dict[str, EvalResult]:
    """Client id -> metrics on a split, of the replies that have them."""
    results = {}
    for client_id in sorted(replies):
        one = replies[client_id].evaluated.get(split)
        if one is not None and one.num_examples:
            loss = math.nan if one.loss is None else one.loss
            results[client_id] = EvalResult(one.num_examples, loss, one.accuracy, one.macro_f1)
    return results


def _means_by_split(results: Mapping[str, Mapping[str, EvalResult]]) -> dict[str, Any]:
    return {
        split: {"weighted": mean_results(own, weighted=True), "unweighted": mean_results(own, weighted=False)}
        for split, own in results.items()
    }


def _describe(record: Mapping[str, Any], num_rounds: int) -> str:
    parts = [f"{len(record['cohort']) - len(record['excluded'])} of {len(record['cohort'])} sites"]
    if record["train_loss"] is not None:
        parts.append(f"train loss {record['train_loss']:.4f}")
    if record["excluded"]:
        parts.append(f"excluded {', '.join(record['excluded'])}")
    return f"round {record['round_num']}/{num_rounds}: {', '.join(parts)}"
