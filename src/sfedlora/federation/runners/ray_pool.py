"""Worker processes that Ray starts and watches, and a queue of jobs that idle workers take from.

Which cluster they run on is the matter of `ray_cluster`; what they do inside, of `worker`.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

from sfedlora.errors import ConfigError, InputError, RunError
from sfedlora.federation.runners.packing import Packed
from sfedlora.federation.runners.ray_cluster import Cluster, WorkerResources
from sfedlora.federation.runners.worker import Place, Reply, Worker
from sfedlora.federation.state import Federation

__all__ = ["Job", "RayPool"]

START_SECONDS = 900.0
"""How long a run waits when no worker works: all of them load the model, or wait for a machine of the cluster."""
MAX_DEATHS = 2
"""A job whose worker died so often is not tried again; nor is a worker that died so often while it loaded the model."""

Subject = TypeVar("Subject")


@dataclass(frozen=True, eq=False)
class Job(Generic[Subject]):
    """What one worker is to do.

    Attributes:
        subject: whom it is about, for whoever deals it.
        method: the method of `Worker`.
        arguments: its arguments; tensors that many jobs need as `RayPool.share` gave them.
    """

    subject: Subject
    method: Literal["train", "evaluate"]
    arguments: tuple[Any, ...]


@dataclass(eq=False)
class _Seat:
    """One worker: its actor, what it was asked last, for which job, and where it runs.

    Without a question it is idle, without a place it is loading model and data.
    """

    number: int
    actor: Any = None
    asked: Any = None
    job: Job[Any] | None = None
    place: Place | None = None
    failed_starts: int = 0
    gone: bool = False


class RayPool:
    """Owner of the workers and of their cluster."""

    def __init__(self, resources: WorkerResources, start: Callable[[], Federation]) -> None:
        """Start the workers; they load model and data while this process goes on.

        Args:
            resources: how many, and what each may use.
            start: makes a worker's federation; called in the worker's process.

        Raises:
            ConfigError: Ray is not installed, no cluster answers, or the cluster is too small.
        """
        self._cluster = Cluster(resources)
        self._seats = [_Seat(number) for number in range(1, resources.num_workers + 1)]
        try:
            self._actor = self._cluster.ray.remote(Worker).options(
                num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, scheduling_strategy="SPREAD"
            )
            self._start = start
            for seat in self._seats:
                self._fill(seat)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers and what was started for them. What they were doing is lost."""
        for seat in self._seats:
            if seat.actor is not None:
                self._cluster.kill(seat.actor)
        self._seats = []
        self._cluster.close()

    @property
    def places(self) -> tuple[Place | None, ...]:
        """Where each worker runs; None for one that is loading model and data, or gone."""
        return tuple(seat.place for seat in self._seats)

    def share(self, tensors: Packed) -> Any:
        """Tensors that travel to each machine once, however many jobs name them."""
        return self._cluster.ray.put(tensors)

    def deal(self, jobs: Iterable[Job[Subject]]) -> Iterator[tuple[Job[Subject], Reply[Any] | None]]:
        """Give each idle worker the next job until all are done. One whose worker dies goes to the next idle worker.

        Yields:
            Job and reply, in the order of completion; None for a job that cost two workers.

        Raises:
            RunError: no worker is left.
            ConfigError: a worker cannot load what the run needs.
        """
        source = iter(jobs)
        ahead: deque[Job[Subject]] = deque()  # one is made in advance, so that no idle worker waits for it
        deaths: dict[Job[Subject], int] = {}
        for seat in self._seats:
            seat.job = None  # of an earlier call that was not driven to its end; nobody asks for its reply any more
        self._occupy(ahead, source)
        while any(seat.job for seat in self._seats) or ahead:
            seat = self._next_answer()
            job, reply = seat.job, self._answer(seat)
            if job is not None and reply is None:
                deaths[job] = deaths.get(job, 0) + 1
                if deaths[job] < MAX_DEATHS:
                    ahead.appendleft(job)
                    job = None
            self._occupy(ahead, source)  # before whoever takes the reply goes to work on it
            if job is not None:
                yield job, reply

    def _occupy(self, ahead: deque[Job[Subject]], source: Iterator[Job[Subject]]) -> None:
        """Give idle workers their next jobs, and make the one after those."""
        while True:
            if not ahead:
                ahead.extend(islice(source, 1))
            idle = next((seat for seat in self._seats if seat.asked is None and not seat.gone), None)
            if idle is None or not ahead:
                return
            self._ask(idle, ahead.popleft())

    def _ask(self, seat: _Seat, job: Job[Any]) -> None:
        seat.job, seat.asked = job, getattr(seat.actor, job.method).remote(*job.arguments)

    def _fill(self, seat: _Seat) -> None:
        """Start a worker, and have it load model and data."""
        seat.actor, seat.place = self._actor.remote(self._start), None
        seat.asked = seat.actor.ready.remote()

    def _next_answer(self) -> _Seat:
        """Wait for the next worker that answers or dies."""
        asked = {seat.asked: seat for seat in self._seats if seat.asked is not None}
        if not asked:
            raise RunError(
                f"all {len(self._seats)} workers died while they loaded model and data, so none is left (not enough "
                "memory for so many?); set workers lower in config.yaml and resume"
            )
        timeout = None if any(seat.job for seat in self._seats) else START_SECONDS
        done, _ = self._cluster.ray.wait(list(asked), num_returns=1, timeout=timeout)
        if not done:
            raise RunError(f"no worker became ready within {START_SECONDS:g} s; is the cluster busy with other work?")
        return asked[done[0]]

    def _answer(self, seat: _Seat) -> Reply[Any] | None:
        """Take a worker's answer; None where it has become ready, or died."""
        exceptions = self._cluster.ray.exceptions
        asked, seat.asked = seat.asked, None
        job, seat.job = seat.job, None
        try:
            answer = self._cluster.ray.get(asked)
        except exceptions.RayActorError:
            self._bury(seat, again=", its clients run again" if job is not None else "")
            return None
        except exceptions.RayTaskError as error:
            if seat.place is None:
                raise _failed_start(seat, error.cause) from None
            raise
        if isinstance(answer, Reply):
            return answer
        seat.place = answer
        return None

    def _bury(self, seat: _Seat, *, again: str) -> None:
        """Replace a worker that died, unless its replacements die, too, while they load model and data."""
        self._cluster.kill(seat.actor)  # it may be out of reach only
        if seat.place is None:
            seat.failed_starts += 1
            who, seat.gone = "", seat.failed_starts >= MAX_DEATHS
            when = " while it loaded model and data"
        else:
            seat.failed_starts = 0
            who, when = f" (process {seat.place.pid} on {seat.place.host})", ""
        then = "it is given up" if seat.gone else f"Ray starts another{again}"
        if not seat.gone:
            self._fill(seat)
        warnings.warn(f"worker {seat.number}{who} died{when}; {then}", stacklevel=2)


def _failed_start(seat: _Seat, cause: Exception) -> Exception:
    if isinstance(cause, InputError):
        return ConfigError(f"worker {seat.number} cannot run this federation: {cause}")
    lines = [*str(cause).strip().splitlines(), ""]
    return RunError(f"worker {seat.number} could not load model and data: {type(cause).__name__}: {lines[0]}")
