"""One run from configuration to artefacts, as a generator of events, and what can be done with a finished one.

    result = run(RunConfig.load("run.yaml", ["lora.rank=128"]))

`run` and `resume` drive `run_events` to its end. A command line drives it itself to show progress; it throws
`Interrupted` into the generator to stop after the client in hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfedlora.artifacts import (
    Checkpoint,
    CheckpointWriter,
    Recovered,
    RunDirectory,
    WriteBehind,
    adapter_facts,
    load_partial,
    newest_intact,
    remove_partial,
    save_partial,
    with_kept_best,
    write_served,
)
from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError, DataError, InputError, Interrupted, StorageError
from sfedlora.federation.client import ClientOutcome
from sfedlora.federation.evaluate import EvalResult, mean_results
from sfedlora.federation.round import (
    ClientEvaluated,
    ClientTrained,
    Event,
    RoundFinished,
    Split,
    evaluate_clients,
    evaluate_external,
    run_round,
)
from sfedlora.federation.runners.workers import running
from sfedlora.federation.sampling import sample_cohort
from sfedlora.federation.spool import Spool
from sfedlora.federation.state import Federation, FederationState, initial_state, serving_adapter, with_clients
from sfedlora.setup import Prepared, prepare

__all__ = [
    "FLOWER",
    "RunEvent",
    "RunPrepared",
    "RunResult",
    "config_digest",
    "load_state",
    "resume",
    "resume_events",
    "run",
    "run_events",
    "with_best",
    "write_adapter",
]


FLOWER = "flower"
"""Key of environment.json that a server across sites writes."""


@dataclass(frozen=True)
class RunPrepared:
    """Model and data are loaded and the run directory exists; rounds begin."""

    prepared: Prepared
    run_dir: Path
    first_round: int


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run_dir: the run directory.
        summary: content of summary.json.
        metrics: the lines of metrics.jsonl.
    """

    run_dir: Path
    summary: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]

    def adapter(self, client_id: str | None = None) -> Path:
        """The PEFT directory of a client's adapter, or of the shared part; give it to `PeftModel.from_pretrained`.

        Raises:
            InputError: the client did not take part.
        """
        path = RunDirectory(self.run_dir).adapter_path(client_id)
        if not path.is_dir():
            there = RunDirectory(self.run_dir).partition()["clients"]
            raise InputError(f"no adapter of client {client_id!r}; clients are {', '.join(there)}")
        return path


RunEvent = RunPrepared | Event | RunResult


def run(config: RunConfig) -> RunResult:
    """Run a federation from its first round.

    Raises:
        InputError: the configuration, data or model cannot be used.
        RunError: the run failed on the way; it can be resumed.
    """
    return _last(run_events(config))


def resume(run_dir: str | Path) -> RunResult:
    """Go on after the last complete round; the result has the bits of an uninterrupted run.

    Raises:
        InputError: no run directory, or data or model have changed since.
    """
    return _last(resume_events(Path(run_dir)))


def run_events(config: RunConfig) -> Iterator[RunEvent]:
    """The events of a new run, ending with its `RunResult`."""
    output = Path(config.output)
    RunDirectory.check_free(output)
    with _threads_restored():
        prepared = prepare(config)
        environment = {**prepared.environment, "config_sha256": config_digest(prepared.config.model_dump(mode="json"))}
        with (
            running(prepared.federation.runner),
            RunDirectory.created(output, prepared.config, environment, prepared.partition) as directory,
        ):
            yield RunPrepared(prepared, output, 1)
            writer = CheckpointWriter(directory.checkpoints)
            checkpoint = yield from _begin(prepared, writer)
            yield from _drive(directory, prepared, writer, checkpoint, {})


def resume_events(run_dir: Path) -> Iterator[RunEvent]:
    """The events of a run that goes on, ending with its `RunResult`."""
    directory = RunDirectory.open(run_dir)
    if directory.summary():
        directory.remove_stale_owner()
        yield RunResult(run_dir, directory.summary(), tuple(directory.metrics()))
        return
    with directory.owned(), _threads_restored():
        directory.check_usable()
        _require_local(directory)
        config = directory.config()
        _require_same_config(directory)
        prepared = prepare(_with_output(config, run_dir))
        _require_same(directory, prepared)
        with running(prepared.federation.runner):
            yield from _go_on(directory, prepared)


def load_state(run_dir: Path, round_num: int | None = None) -> tuple[Prepared, FederationState]:
    """Rebuild a run's federation and the state after one of its kept rounds (None: the last that is intact).

    Raises:
        InputError: no run directory, a round without checkpoint, or data or model have changed since.
        StorageError: the checkpoint is damaged.
    """
    directory = RunDirectory.open(run_dir)
    directory.check_usable()
    _require_local(directory)
    checkpoints = directory.checkpoints
    rounds = checkpoints.rounds()
    if not rounds or (round_num is not None and round_num not in rounds):
        raise InputError(f"{run_dir}: no checkpoint of round {round_num}; kept are rounds {rounds}")
    checkpoint = _newest(directory).checkpoint if round_num is None else checkpoints.verify(round_num, set())
    prepared = prepare(_with_output(directory.config(), run_dir))
    _require_same(directory, prepared)
    return prepared, _known(checkpoint).state


def _require_local(directory: RunDirectory) -> None:
    """Refuse the directory of a server across sites: examples, B and heads are at the sites."""
    if FLOWER in directory.environment():
        raise InputError(
            f"{directory.path}: holds the server's part of a run across sites, which cannot be resumed or evaluated "
            "here; go on with `flwr run ... -c 'resume=true'`, or use the adapters of the sites"
        )


def _go_on(directory: RunDirectory, prepared: Prepared) -> Iterator[RunEvent]:
    """The events of a run after its newest intact checkpoint."""
    recovered = _newest(directory)
    checkpoints = directory.checkpoints
    for round_num in recovered.damaged:
        checkpoints.remove(round_num)
    directory.remove_leftovers()
    checkpoint = recovered.checkpoint
    round_num = 0 if checkpoint is None else checkpoint.state.server.round_num
    yield RunPrepared(prepared, directory.path, round_num + 1)
    directory.drop_metrics_after(round_num)
    directory.require_metrics_to(round_num)
    writer = CheckpointWriter(checkpoints)
    if checkpoint is None:
        checkpoint = yield from _begin(prepared, writer)
    checkpoint = with_kept_best(checkpoint, recovered.kept, directory.metrics())
    writer.drop(checkpoint.progress["best_round"])
    for record in directory.metrics()[-1:]:
        recorded = record.get("clients_per_batch")  # absent in runs of earlier versions
        if isinstance(recorded, int):
            prepared.federation.runner.stack_at_most(recorded)
    yield from _drive(directory, prepared, writer, checkpoint, _partial_outcomes(directory, round_num + 1))


def _newest(directory: RunDirectory) -> Recovered:
    """What is intact of a run's checkpoints; a damaged one is told."""
    recovered = newest_intact(directory.checkpoints)
    warning = recovered.warning()
    if warning:
        warnings.warn(warning, stacklevel=2)
    return recovered


def _partial_outcomes(directory: RunDirectory, round_num: int) -> dict[str, ClientOutcome]:
    """Outcomes kept for an interrupted round; none if they are damaged: those clients train again, to the same bits."""
    path = directory.checkpoints.path
    try:
        return load_partial(path, round_num)
    except StorageError as error:
        remove_partial(path)
        warnings.warn(f"the clients of the interrupted round train again: {error}", stacklevel=2)
        return {}


def _with_output(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration with its run directory where it lies now: a run may be moved."""
    return config.with_values({"output": str(run_dir)})


def write_adapter(
    prepared: Prepared, state: FederationState, client_id: str | None, directory: Path, *, private: bool = False
) -> None:
    """Write what a client serves (None: the shared factors) as a stock PEFT directory.

    Base deltas are joined to the adapter; its gamma is then 1 and its rank that of both together. A private directory
    is open to its owner alone, whatever the umask.
    """
    federation = prepared.federation
    size, tensors = federation.sizes.server, {**federation.initial, **state.server.shared}
    if client_id is not None:
        size, tensors = federation.sizes.of(client_id), serving_adapter(federation, state, client_id)
    facts = adapter_facts(
        prepared.config,
        layout=federation.resident.layout,
        target_suffixes=federation.resident.target_suffixes,
        base_model_name=prepared.base.name_or_path,
        scaling_clients=prepared.scaling_clients,
    )
    write_served(directory, tensors, state.server.extra, size, facts, private=private)


def _begin(prepared: Prepared, writer: CheckpointWriter) -> Generator[ClientEvaluated, None, Checkpoint]:
    """Evaluate and store the state before round 1."""
    state = initial_state(prepared.federation)
    initial = yield from _evaluate_both(prepared.federation, state)
    progress = {"best_round": None, "best_loss": None, "initial": initial}
    return Checkpoint(writer.save(Checkpoint(state, progress), changed=(), best_round=0), progress)


def _drive(
    directory: RunDirectory,
    prepared: Prepared,
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    finished: Mapping[str, ClientOutcome],
) -> Iterator[RunEvent]:
    """Run the rounds after a checkpoint; each is stored while the next one runs."""
    federation = prepared.federation
    outcomes = dict(finished)
    stored, progress = checkpoint.state, checkpoint.progress
    state = stored
    with Spool(directory.checkpoints.path) as spool, WriteBehind[FederationState]() as behind:
        try:
            while state.server.round_num < federation.rounds.num_rounds:
                for event in run_round(federation, state, dict(outcomes), spool):
                    if isinstance(event, ClientTrained) and event.outcome is not None:
                        outcomes[event.client_id] = event.outcome
                    if isinstance(event, RoundFinished):
                        stored = behind.wait() or stored
                        changed = sorted(outcomes.keys() - event.record["excluded"].keys())
                        state = _over(stored, event.state, changed)
                        progress = with_best(progress, event.record)
                        behind.start(
                            partial(_store_round, directory, writer, Checkpoint(state, progress), event.record, changed)
                        )
                        outcomes = {}
                    yield event
        except Interrupted:
            behind.wait()
            save_partial(directory.checkpoints.path, outcomes)
            raise
        stored = behind.wait() or stored
    yield from _finish(directory, prepared, stored, progress)


def _over(stored: FederationState, state: FederationState, changed: Sequence[str]) -> FederationState:
    """A state whose changed clients are in memory until they are stored, and all others on disk."""
    personal = {client_id: state.personal[client_id] for client_id in changed}
    moments = {client_id: state.optimizer[client_id] for client_id in changed if client_id in state.optimizer}
    return FederationState(
        state.server, with_clients(stored.personal, personal), with_clients(stored.optimizer, moments)
    )


def with_best(progress: Mapping[str, Any], record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The progress after a round: a finite loss below all before makes it the best."""
    loss, best = record["eval_loss"], progress["best_loss"]
    if loss is None or not math.isfinite(loss) or (best is not None and loss >= best):
        return progress
    return {**progress, "best_round": record["round_num"], "best_loss": loss}


def _store_round(
    directory: RunDirectory,
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    changed: Sequence[str],
) -> FederationState:
    """Store a round: its metrics line first, so that a checkpoint never lacks its line."""
    directory.append_metrics(record)
    return writer.save(checkpoint, changed=changed, best_round=checkpoint.progress["best_round"])


def _finish(
    directory: RunDirectory, prepared: Prepared, state: FederationState, progress: Mapping[str, Any]
) -> Iterator[RunEvent]:
    """Write the adapters, evaluate last and best round on test, write the summary."""
    federation = prepared.federation
    directory.make_client_adapters()
    for client_id in (None, *sorted(state.personal)):
        write_adapter(prepared, state, client_id, directory.adapter_path(client_id), private=client_id is not None)
    last = yield from _evaluate_both(federation, state)
    last_round, best_round = state.server.round_num, progress["best_round"]
    if best_round is None or best_round == last_round:
        best = last
    else:
        best = yield from _evaluate_both(federation, directory.checkpoints.load(best_round).state)
    summary = {
        "initial": progress["initial"],
        "last": {"round_num": last_round, **last},
        "best": {"round_num": last_round if best_round is None else best_round, **best},
        "store_bytes": directory.checkpoints.client_bytes(),
    }
    summary |= {key: value for key, value in directory.metrics()[-1].items() if key in ("privacy", "example_privacy")}
    directory.write_summary(summary)
    yield RunResult(directory.path, directory.summary(), tuple(directory.metrics()))


def _evaluate_both(federation: Federation, state: FederationState) -> Generator[ClientEvaluated, None, dict[str, Any]]:
    validation = yield from _evaluate_split(federation, state, "validation")
    test = yield from _evaluate_split(federation, state, "test")
    return {"validation": validation, "test": test}


def _evaluate_split(
    federation: Federation, state: FederationState, split: Split
) -> Generator[ClientEvaluated, None, dict[str, Any]]:
    results: dict[str, EvalResult] = {}
    cohort = sample_cohort(
        list(federation.participants),
        federation.rounds.cohort_size,
        seed=federation.seed,
        round_num=max(1, state.server.round_num),
    )
    for client_id, count, result in evaluate_clients(federation, state, split, cohort):
        results[client_id] = result
        yield ClientEvaluated(state.server.round_num, client_id, count)
    means = {
        "weighted": mean_results(results, weighted=True),
        "unweighted": mean_results(results, weighted=False),
        "clients": {client_id: result.metrics() for client_id, result in results.items()},
    }
    return means | evaluate_external(federation, state, list(results), split)


def config_digest(settings: Mapping[str, Any]) -> str:
    """Digest of every setting but the run directory, which may be moved, and workers, which change no result."""
    counted = {key: value for key, value in settings.items() if key not in ("output", "workers")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def _require_same_config(directory: RunDirectory) -> None:
    """Refuse a config.yaml that was edited: gamma, data order and seeds are constants of a run.

    The file is compared as it was written, so a key that only a later version knows does not make it another one.
    """
    if directory.environment().get("config_sha256") != config_digest(directory.settings()):
        raise ConfigError(
            f"{directory.path / 'config.yaml'}: was edited since the run began; put it back, or run the edited "
            "file with another output"
        )


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Leave the process with the thread count and the precision of products it had: a run sets its own."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def _require_same(directory: RunDirectory, prepared: Prepared) -> None:
    """Refuse to go on with other data or another base model than the run began with."""
    recorded, environment = directory.partition(), directory.environment()
    data = prepared.config.data
    if recorded["source_sha256"] != prepared.partition["source_sha256"]:
        raise DataError(f"data.source: {data.source} has changed since the run began; put the old file back")
    for split, source in (("validation", data.validation), ("test", data.test)):
        if environment["external_sha256"].get(split) != prepared.environment["external_sha256"].get(split):
            raise DataError(f"data.{split}: {source} has changed since the run began; put the old file back")
    if recorded["clients"] != prepared.partition["clients"]:
        raise DataError(
            f"{directory.path / 'partition.json'}: the examples would be dealt otherwise than when the run began; "
            "config.yaml or partition.json was edited, or other library versions are installed (environment.json)"
        )
    if environment["base_model"]["sha256"] != prepared.environment["base_model"]["sha256"]:
        raise DataError(f"model.source: {prepared.config.model.source} has other weights than when the run began")


def _known(checkpoint: Checkpoint | None) -> Checkpoint:
    if checkpoint is None:
        raise StorageError("no checkpoint is left")
    return checkpoint


def _last(events: Iterator[RunEvent]) -> RunResult:
    for event in events:
        if isinstance(event, RunResult):
            return event
    raise StorageError("the run ended without a result")
