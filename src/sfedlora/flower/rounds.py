"""The rounds of a federation across sites.

    round t + 1   every site: evaluate the state after round t with its own B, train from it, send what is shared
    in the end    every site: evaluate the last state, write its adapter; then evaluate the best state

So a node gets one message per round, and the evaluation of round t comes with the answers of round t + 1; until then
the line of round t waits in the checkpoint (`pending`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfedlora.artifacts import Checkpoint, CheckpointWriter, RunDirectory, adapter_facts, write_served
from sfedlora.errors import RunError
from sfedlora.experiment import with_best
from sfedlora.federation.evaluate import EvalResult
from sfedlora.federation.round import protection_record
from sfedlora.federation.sampling import choose_evaluated, sample_cohort
from sfedlora.federation.server_step import accept_updates, server_step_by_change, server_step_with_record
from sfedlora.federation.spool import Spool
from sfedlora.federation.state import FederationState
from sfedlora.flower.asking import LostStateError, Task, open_masked_reply, open_reply, request_of
from sfedlora.flower.protocol import Envelope, MessageError, RoundReply, SecureRound
from sfedlora.flower.secure_round import Messages, secure_round
from sfedlora.flower.server_record import (
    Split,
    describe,
    evaluated_record,
    evaluation_results,
    means_by_split,
    trained_record,
)
from sfedlora.flower.sites import Log, Sites
from sfedlora.privacy.mechanism import with_noise_key
from sfedlora.setup.server import PreparedServer
from sfedlora.types import Part, ServerState, Tensors, Update, select_parts

__all__ = ["Rounds", "first_checkpoint"]

Splits = tuple[Split, ...]


def first_checkpoint(server: PreparedServer) -> Checkpoint:
    """The state before round 1; no file is written for it."""
    parts = frozenset(Part) - server.rules.method.personal_parts()
    state = with_noise_key(server.rules.privacy, ServerState(0, select_parts(server.initial, parts), {}))
    nothing = dict.fromkeys(("initial", "best_round", "best_loss", "pending"))
    return Checkpoint(FederationState(state, {}, {}), {**nothing, "best_accepted": {}})


@dataclass(frozen=True)
class _Answers:
    """What the sites answered.

    Attributes:
        replies: client id -> its reply.
        updates: client id -> its factors, on the disk until they are read.
        failed: client id -> why there is no usable reply.
        bytes_up, bytes_down: of factors.
    """

    replies: Mapping[str, RoundReply]
    updates: Mapping[str, Tensors]
    failed: Mapping[str, str]
    bytes_up: int
    bytes_down: int


class Rounds:
    """Owner of a run while it runs: its directory, its sites, its state, a scratch folder for updates.

    The state is the only copy of the shared factors between rounds, so callers keep no checkpoint of their own.
    """

    def __init__(
        self,
        server: PreparedServer,
        sites: Sites,
        directory: RunDirectory,
        checkpoint: Checkpoint,
        *,
        scratch: Path,
        log: Log,
    ) -> None:
        """Take what a run consists of and where it goes on; `log` takes one line of text."""
        self._server, self._sites, self._directory, self._scratch, self._log = server, sites, directory, scratch, log
        self._flower, self._checkpoint = server.config.flower, checkpoint
        self._writer = CheckpointWriter(directory.checkpoints)

    def run(self) -> None:
        """Run the rounds that are left; every one is stored before the next begins.

        Raises:
            RunError: a round had too few usable replies.
        """
        self._writer.drop(self._checkpoint.progress["best_round"])  # what a killed server had no time to remove
        while self._checkpoint.state.server.round_num < self._server.rounds.num_rounds:
            with Spool(self._scratch) as spool:
                self._checkpoint = self._round(self._checkpoint, spool)
            best_round = self._checkpoint.progress["best_round"]
            self._writer.save(self._checkpoint, changed=(), best_round=best_round)

    def finish(self) -> None:
        """Evaluate the last and the best state, have the adapters written, write the summary."""
        state, progress = self._checkpoint.state.server, self._checkpoint.progress
        last = self._evaluate(state, self._accepted(), progress, write_adapter=True)
        progress = self._completed(progress, last["validation"])
        self._write_shared(state)
        best, best_round = last, progress["best_round"]
        if best_round not in (None, state.round_num):
            before = self._directory.checkpoints.load(best_round).state.server
            best = self._evaluate(before, progress["best_accepted"], progress)
        self._directory.write_summary(
            {
                "initial": progress["initial"],
                "last": {"round_num": state.round_num, **means_by_split(self._server, last)},
                "best": {"round_num": best_round or state.round_num, **means_by_split(self._server, best)},
                "store_bytes": 0,
            }
        )

    def _round(self, checkpoint: Checkpoint, spool: Spool) -> Checkpoint:
        """The round after a checkpoint."""
        state, progress, rules = checkpoint.state.server, checkpoint.progress, self._server.rules
        round_num, least = state.round_num + 1, self._flower.min_replies
        expected = len(self._sites.known) if self._flower.secure_sum else least
        self._sites.wait_for(expected, enough=least, seconds=self._flower.join_deadline_seconds)
        accepted = self._accepted()
        cohort, evaluated = self._cohort(round_num), self._evaluated(state.round_num)
        if state.round_num % self._server.rounds.evaluate_every:
            evaluated = ()
        splits: Splits = ("validation",) if state.round_num else ("validation", "test")
        clock = time.perf_counter()
        secure = secure_round(
            self._server.config, {client_id: self._sites.known[client_id].num_examples for client_id in cohort}
        )
        tasks = [
            self._task(
                client_id,
                accepted,
                progress,
                evaluate=splits if client_id in evaluated else (),
                train=client_id in cohort,
                secure=secure if client_id in cohort else None,
            )
            for client_id in sorted({*cohort, *evaluated})
        ]
        messages = None if secure is None else Messages(self._server.config, round_num, secure)
        answers = self._ask(state, tasks, spool, messages)
        train_seconds = time.perf_counter() - clock
        results = {split: evaluation_results(answers.replies, split) for split in splits}
        if state.round_num:
            progress = self._completed(progress, results["validation"])
        else:
            progress = {**progress, "initial": means_by_split(self._server, results)}

        clock = time.perf_counter()
        excluded = {client_id: reason for client_id, reason in answers.failed.items() if client_id in cohort}
        offered = [
            Update(client_id, round_num, self._sites.known[client_id].num_examples, tensors)
            for client_id, tensors in sorted(answers.updates.items())
        ]
        if messages is None:
            updates, refused = accept_updates(rules, state, offered)
            excluded |= refused
            _require_enough(round_num, len(updates), least, excluded)
            after, step_record = server_step_with_record(rules, state, updates, excluded)
        else:
            updates = offered  # without factors: the server has their sum only
            shapes = self._server.skeleton.layout.shapes(rules.sizes.server.rank, rules.method.shared_parts(round_num))
            after = server_step_by_change(rules, state, messages.opened(shapes, excluded))
            step_record = {"secure_sum": True}
        for update in updates:
            self._sites.accept(update.client_id, round_num)
        record = trained_record(self._server, round_num, cohort, updates, answers.replies, excluded) | {
            "bytes_up": answers.bytes_up,
            "bytes_down": answers.bytes_down,
            **protection_record(
                self._server.rounds,
                step_record,
                client_ids=list(self._sites.known),
                seed=self._server.config.seed,
                round_num=round_num,
            ),
            "train_seconds": train_seconds,
            "aggregate_seconds": time.perf_counter() - clock,
        }
        self._log(describe(record, self._server.rounds.num_rounds))
        known = {client_id: site.plain() for client_id, site in sorted(self._sites.known.items())}
        return Checkpoint(FederationState(after, {}, {}), {**progress, "pending": record, "sites": known})

    def _cohort(self, round_num: int) -> tuple[str, ...]:
        everybody, settings = list(self._sites.known), self._server.rounds
        return sample_cohort(everybody, settings.cohort_size, seed=self._server.config.seed, round_num=round_num)

    def _evaluated(self, round_num: int) -> tuple[str, ...]:
        """Who is evaluated with the state after a round."""
        cohort, evaluated = self._cohort(max(1, round_num)), self._server.rounds.evaluated
        return choose_evaluated(list(self._sites.known), evaluated, cohort, seed=self._server.config.seed)

    def _accepted(self) -> dict[str, int]:
        return {client_id: site.accepted_round for client_id, site in self._sites.known.items()}

    def _task(  # noqa: PLR0917 - what a site is to do, and from where
        self,
        client_id: str,
        accepted: Mapping[str, int],
        progress: Mapping[str, Any],
        evaluate: Splits = (),
        train: bool = False,
        write_adapter: bool = False,
        secure: SecureRound | None = None,
    ) -> Task:
        return Task(
            client_id,
            self._sites.known[client_id].num_examples,
            personal_round=accepted.get(client_id, 0),
            kept_round=progress["best_accepted"].get(client_id, 0),
            evaluate=evaluate,
            train=train,
            write_adapter=write_adapter,
            secure=secure,
        )

    def _ask(
        self, state: ServerState, tasks: Sequence[Task], spool: Spool, messages: Messages | None = None
    ) -> _Answers:
        """Ask sites; what they send goes to the spool, or in a secure round into the sum.

        A run of secure rounds cannot do without a site, so one that has lost its state is asked again at once.
        """
        by_client = {task.client_id: task for task in tasks}
        bytes_up = bytes_down = 0

        def request_for(client_id: str) -> Envelope:
            nonlocal bytes_down
            request = request_of(self._server, state, by_client[client_id])
            bytes_down += len(request.data)
            return request

        seconds = self._flower.round_deadline_seconds
        replies: dict[str, RoundReply] = {}
        updates: dict[str, Tensors] = {}
        failed: dict[str, str] = {}
        again: list[Task] = []
        for client_id, answer in self._sites.ask(by_client, request_for, seconds=seconds):
            task = by_client[client_id]
            tensors: Tensors = {}
            try:
                if messages is None or not task.train:
                    reply, tensors = open_reply(self._server, state, task, answer)
                else:
                    reply, message = open_masked_reply(self._server, state, task, answer)
                    messages.add(client_id, message)
            except MessageError as error:
                failed[client_id] = str(error)
                self._log(f"round {state.round_num + 1}: site {client_id!r} is excluded: {error}")
                if isinstance(error, LostStateError):
                    self._sites.accept(client_id, 0)
                    if self._flower.secure_sum and task.personal_round:
                        again.append(replace(task, personal_round=0))
                continue
            replies[client_id] = reply
            if reply.trained:
                updates[client_id] = spool.put(client_id, tensors) if tensors else tensors
                bytes_up += len(answer.data) if isinstance(answer, Envelope) else 0
            del answer, tensors  # before the next one is pulled
        answers = _Answers(replies, updates, failed, bytes_up, bytes_down)
        return answers if not again else _joined(answers, self._ask(state, again, spool, messages))

    def _evaluate(
        self,
        state: ServerState,
        accepted: Mapping[str, int],
        progress: Mapping[str, Any],
        *,
        write_adapter: bool = False,
    ) -> dict[Split, dict[str, EvalResult]]:
        """Split -> client id -> metrics of a state; with `write_adapter` every site also writes what it serves."""
        splits: Splits = ("validation", "test")
        evaluated = self._evaluated(state.round_num)
        tasks = [
            self._task(
                client_id,
                accepted,
                progress,
                evaluate=splits if client_id in evaluated else (),
                write_adapter=write_adapter,
            )
            for client_id in sorted(self._sites.known if write_adapter else evaluated)
        ]
        with Spool(self._scratch) as spool:
            answers = self._ask(state, tasks, spool)
        least = min(self._flower.min_replies, len(tasks))
        _require_enough(state.round_num + 1, len(answers.replies), least, answers.failed)
        return {split: evaluation_results(answers.replies, split) for split in splits}

    def _completed(self, progress: Mapping[str, Any], results: Mapping[str, EvalResult]) -> dict[str, Any]:
        """Write the pending line of a round, now that it is evaluated; the progress after it."""
        pending = progress["pending"]
        if pending is None:
            return dict(progress)
        counts = {client_id: site.num_examples for client_id, site in self._sites.known.items()}
        record = evaluated_record(self._server, pending, results, counts)
        self._directory.append_metrics(record)
        after = {**with_best(progress, record), "pending": None}
        if after["best_round"] != progress["best_round"]:
            after["best_accepted"] = {key: site["accepted_round"] for key, site in progress["sites"].items()}
        return after

    def _write_shared(self, state: ServerState) -> None:
        server = self._server
        facts = adapter_facts(
            server.config,
            layout=server.skeleton.layout,
            target_suffixes=server.skeleton.target_suffixes,
            base_model_name=server.skeleton.name_or_path,
            scaling_clients=server.scaling_clients,
        )
        tensors = {**server.initial, **state.shared}
        write_served(self._directory.adapter_path(None), tensors, state.extra, server.rules.sizes.server, facts)


def _joined(first: _Answers, second: _Answers) -> _Answers:
    """The answers of sites of which some were asked twice."""
    return _Answers(
        {**first.replies, **second.replies},
        {**first.updates, **second.updates},
        {key: reason for key, reason in first.failed.items() if key not in second.replies} | dict(second.failed),
        first.bytes_up + second.bytes_up,
        first.bytes_down + second.bytes_down,
    )


def _require_enough(round_num: int, num_usable: int, least: int, excluded: Mapping[str, str]) -> None:
    if num_usable < least:
        reasons = "; ".join(f"{client_id}: {reason}" for client_id, reason in sorted(excluded.items()))
        raise RunError(
            f"round {round_num}: {num_usable} usable replies, flower.min_replies is {least} ({reasons}); mend the "
            "sites and go on with resume=true"
        )
