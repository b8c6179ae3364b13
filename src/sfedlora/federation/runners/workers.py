"""Clients dealt over several worker processes, each with its own base model: GPUs of one machine, or of a cluster.

This process makes the work and aggregates; workers train and evaluate. Stacks of clients are formed here, as one worker
would form them, and dealt whole, so for float32 on one type of device the results have the bits of one worker,
whichever worker trains whom. The next stack goes to the next idle worker, expensive ones first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sfedlora.errors import ClientError, RunError
from sfedlora.federation.client import ClientOutcome, ClientWork
from sfedlora.federation.eval_work import EvalWork
from sfedlora.federation.evaluate import EvalResult
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.costs import Costs
from sfedlora.federation.runners.packing import pack
from sfedlora.federation.runners.ray_cluster import WorkerResources
from sfedlora.federation.runners.ray_pool import MAX_DEATHS, Job, RayPool
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.runners.worker import Place, Reply, receive, send, send_evaluation
from sfedlora.federation.state import Federation
from sfedlora.types import Tensors

__all__ = ["WorkersRunner", "running"]

Stack = Sequence[ClientWork]
Client = TypeVar("Client")


class WorkersRunner:
    """Runs a cohort on several workers; owner of the workers between `start` and `close`.

    Attributes:
        inner: the runner that each worker has, here for its order and its stacks.
        make_federation: makes a worker's federation, in the worker's process.
    """

    def __init__(
        self,
        inner: SerialRunner | BatchedRunner,
        resources: WorkerResources,
        make_federation: Callable[[], Federation],
    ) -> None:
        """Take what workers need; none is started.

        Args:
            inner: as above.
            resources: how many workers, and what each may use.
            make_federation: as above.
        """
        self.inner = inner
        self.make_federation, self._resources = make_federation, resources
        self._pool: RayPool | None = None
        self._costs = Costs(inner.setup.data.lengths, inner.setup.training)

    def start(self) -> RayPool:
        """Start the workers unless they run; they load model and data while this process goes on."""
        if self._pool is None:
            self._pool = RayPool(self._resources, self.make_federation)
        return self._pool

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    @property
    def is_running(self) -> bool:
        """Whether workers were started and not ended."""
        return self._pool is not None

    @property
    def places(self) -> tuple[Place | None, ...]:
        """Where each worker runs; None for one that is loading model and data, or is gone for good."""
        return () if self._pool is None else self._pool.places

    @property
    def clients_per_batch(self) -> int:
        """Clients in a stack at present, on every worker."""
        return self.inner.clients_per_batch

    def stack_at_most(self, clients_per_batch: int) -> None:
        """As the inner runner: stacks are formed here."""
        self.inner.stack_at_most(clients_per_batch)

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        """The stacks of the inner runner, the most expensive first; one that is not full stays last."""
        costs = self._costs.of(cohort)

        def key(stack: Sequence[str]) -> tuple[bool, float]:
            return len(stack) < self.clients_per_batch, -sum(costs[client_id] for client_id in stack)

        stacks = self._stacks(self.inner.order(cohort, done))
        return [client_id for stack in sorted(stacks, key=key) for client_id in stack]

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        """Train the clients of a cohort.

        A client whose worker dies runs again on another. One that costs two workers gives an error; a stack that costs
        two is halved, to find out who it was.
        """
        pool = self.start()
        shared = _Shared(pool)

        def job_of(stack: Stack) -> Job[Stack]:
            return Job(stack, "train", (tuple(map(send, stack)), shared.of(stack[0].base_deltas)))

        stacks: Iterable[Stack] = self._stacks(cohort)
        while True:
            lost: list[Stack] = []
            for job, reply in pool.deal(map(job_of, stacks)):
                if reply is not None:
                    self._learn(reply)
                    self._costs.note({work.client_id: work.indices for work in job.subject}, reply.seconds)
                    yield from map(receive, reply.results)
                elif len(job.subject) == 1:
                    yield _excluded(job.subject[0])
                else:
                    half = (len(job.subject) + 1) // 2
                    lost += [job.subject[:half], job.subject[half:]]
            if not lost:
                return
            stacks = lost

    def evaluate(self, works: Iterable[EvalWork]) -> Iterator[tuple[EvalWork, list[EvalResult]]]:
        """Evaluate clients; the pieces in their order.

        Raises:
            RunError: a piece cost two workers.
        """
        pool = self.start()
        shared = _Shared(pool)
        jobs = (
            Job((index, work), "evaluate", (send_evaluation(work), shared.of(work.base_deltas)))
            for index, work in enumerate(works)
        )
        waiting: dict[int, tuple[EvalWork, list[EvalResult]]] = {}
        next_index = 0
        for job, reply in pool.deal(jobs):
            index, work = job.subject
            if reply is None:
                raise RunError(
                    f"{MAX_DEATHS} workers died while they evaluated {', '.join(work.client_ids)} (out of memory?); "
                    "lower evaluation.batch_size or evaluation.max_batch_tokens"
                )
            self._learn(reply)
            waiting[index] = work, reply.results
            while next_index in waiting:
                yield waiting.pop(next_index)
                next_index += 1

    def _stacks(self, clients: Iterable[Client]) -> Iterator[list[Client]]:
        """Cut clients as one worker would, each stack when it is asked for."""
        if isinstance(self.inner, BatchedRunner):
            return self.inner.stacks(clients)
        return ([client] for client in clients)

    def _learn(self, reply: Reply[Any]) -> None:
        """Take up how many clients a worker's memory holds, and what it warned of."""
        self.stack_at_most(reply.clients_per_batch)
        for text in reply.warnings:
            warnings.warn(text, stacklevel=2)


@contextmanager
def running(runner: Runner) -> Iterator[None]:
    """A runner's workers, where it has any, run from here to the end of the block."""
    if not isinstance(runner, WorkersRunner):
        yield
        return
    try:
        runner.start()
        yield
    finally:
        runner.close()


class _Shared:
    """The base deltas of one cohort or evaluation, which all its jobs have in common: handed to Ray once."""

    def __init__(self, pool: RayPool) -> None:
        self._pool = pool
        self._packed: Any = None

    def of(self, base_deltas: Tensors) -> Any:
        if self._packed is None:
            self._packed = self._pool.share(pack(base_deltas))
        return self._packed


def _excluded(work: ClientWork) -> ClientError:
    reason = f"{MAX_DEATHS} workers died while they trained it (out of memory?)"
    return ClientError(reason, client_id=work.client_id, round_num=work.round_num, stage="training")
