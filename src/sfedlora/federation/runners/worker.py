"""What runs inside a worker process: a federation of its own, whose clients it trains and evaluates as it is asked.

Not here: who starts workers and deals clients to them (`workers`), and anything of Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork
from sfedlora.federation.eval_work import EvalWork, evaluate_work
from sfedlora.federation.evaluate import EvalResult
from sfedlora.federation.runners.packing import Packed, pack, unpack
from sfedlora.federation.state import Federation
from sfedlora.types import Tensors

__all__ = ["Place", "Reply", "Worker", "receive", "send", "send_evaluation"]

Results = TypeVar("Results")
_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class SentWork:
    """A client's work on its way: the work without its tensors, and those."""

    work: ClientWork
    start: Packed
    optimizer_state: Packed


@dataclass(frozen=True)
class SentEvalWork:
    """A piece of an evaluation on its way: the piece without its tensors, and those."""

    work: EvalWork
    adapters: tuple[Packed, ...]


@dataclass(frozen=True)
class SentOutcome:
    """A client's outcome on its way: the outcome without its tensors, and those."""

    outcome: ClientOutcome
    tensors: Packed
    optimizer_state: Packed


@dataclass(frozen=True)
class SentError:
    """A client's error on its way; exceptions with arguments of their own do not survive it."""

    client_id: str
    round_num: int
    stage: str
    reason: str


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    host: str
    pid: int


@dataclass(frozen=True)
class Reply(Generic[Results]):
    """What came of one job.

    Attributes:
        results: one per client, in the order of the job.
        seconds: how long it took.
        clients_per_batch: what the worker's memory holds at a time by now.
        warnings: what the library warned of.
    """

    results: Results
    seconds: float
    clients_per_batch: int
    warnings: tuple[str, ...]


class Worker:
    """Owner of a worker process's federation: its base model, its encoded data, its runner."""

    def __init__(self, start: Callable[[], Federation]) -> None:
        """Take what makes the federation; it is made when it is first asked for.

        Ctrl-C in a terminal reaches every process of it. The run's own process decides what becomes of a run, so a
        worker does not listen.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._start = start
        self._federation: Federation | None = None

    def ready(self) -> Place:
        """Load model and data.

        Raises:
            InputError: they cannot be loaded here, or are not those of the run.
        """
        self._ready()
        return Place(socket.gethostname(), os.getpid())

    def train(self, works: Sequence[SentWork], base_deltas: Packed) -> Reply[tuple[SentOutcome | SentError, ...]]:
        """Train a stack of clients, as the run's runner does in one process."""
        runner = self._ready().runner
        received = _unpack_works(works, unpack(base_deltas))

        def train() -> tuple[SentOutcome | SentError, ...]:
            by_client = {result.client_id: result for result in runner.run_cohort(received)}
            return tuple(_pack_result(by_client[work.client_id]) for work in received)

        return self._reply(train)

    def evaluate(self, sent: SentEvalWork, base_deltas: Packed) -> Reply[list[EvalResult]]:
        """Evaluate clients, as one process does."""
        federation = self._ready()
        work = replace(sent.work, adapters=tuple(map(unpack, sent.adapters)), base_deltas=unpack(base_deltas))
        return self._reply(partial(evaluate_work, federation, work))

    def _reply(self, compute: Callable[[], Results]) -> Reply[Results]:
        clock = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = compute()
        seconds = time.perf_counter() - clock
        texts = tuple(str(one.message) for one in caught if _is_ours(one))
        return Reply(results, seconds, self._ready().runner.clients_per_batch, texts)

    def _ready(self) -> Federation:
        if self._federation is None:
            self._federation = self._start()
        return self._federation


def send(work: ClientWork) -> SentWork:
    """Work on its way to a worker, without its base deltas: those are the same for a whole stack."""
    bare = replace(work, start={}, optimizer_state={}, base_deltas={})
    return SentWork(bare, pack(work.start), pack(work.optimizer_state))


def send_evaluation(work: EvalWork) -> SentEvalWork:
    """As `send`, a piece of an evaluation."""
    return SentEvalWork(replace(work, adapters=(), base_deltas={}), tuple(map(pack, work.adapters)))


def receive(result: SentOutcome | SentError) -> ClientOutcome | ClientError:
    """A result as the runner of this process would have given it."""
    if isinstance(result, SentError):
        return ClientError(result.reason, client_id=result.client_id, round_num=result.round_num, stage=result.stage)
    return replace(result.outcome, tensors=unpack(result.tensors), optimizer_state=unpack(result.optimizer_state))


def _unpack_works(works: Sequence[SentWork], base_deltas: Tensors) -> list[ClientWork]:
    return [
        replace(
            sent.work, start=unpack(sent.start), optimizer_state=unpack(sent.optimizer_state), base_deltas=base_deltas
        )
        for sent in works
    ]


def _pack_result(result: ClientOutcome | ClientError) -> SentOutcome | SentError:
    if isinstance(result, ClientError):
        return SentError(result.client_id, result.round_num, result.stage, result.reason)
    bare = replace(result, tensors={}, optimizer_state={})
    return SentOutcome(bare, pack(result.tensors), pack(result.optimizer_state))


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, UserWarning) and Path(warning.filename).is_relative_to(_PACKAGE)
