"""Shows a run's events: progress bars on a terminal, plain lines otherwise; stops it when the user asks."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sfedlora.cli.forecast import describe_plan
from sfedlora.cli.tracking import Trackers
from sfedlora.compare import CellStarted
from sfedlora.errors import Interrupted, StorageError
from sfedlora.experiment import RunEvent, RunPrepared, RunResult
from sfedlora.federation.round import ClientEvaluated, ClientTrained, RoundFinished, RoundStarted
from sfedlora.types import LoraSizes

__all__ = ["drive", "drive_all"]

AnyEvent = RunEvent | CellStarted


def drive(events: Iterator[RunEvent], track: Sequence[str] = ()) -> RunResult:
    """Drive one run to its end, show it, and tell the trackers of these names.

    Raises:
        Interrupted: the user pressed Ctrl-C; what was done is saved.
    """
    results = list(drive_all(events, track))
    if not results:
        raise StorageError("the run ended without a result")
    return results[-1]


def drive_all(events: Iterator[AnyEvent], track: Sequence[str] = ()) -> Iterator[RunResult]:
    """Drive any number of runs; yield the result of each."""
    trackers = Trackers(track)
    console = Console(stderr=True)
    view: _View = _BarView(console) if console.is_terminal else _LineView(console)
    go_on = ""
    in_grid = False
    with view, trackers, _stop_request() as stop:
        for event in events:
            view.show(event)
            trackers.show(event)
            if isinstance(event, CellStarted):
                in_grid = True
            if isinstance(event, RunPrepared):
                go_on = "the same command again" if in_grid else f"sfedlora resume {event.run_dir}"
            if isinstance(event, RunResult):
                yield event
            between_clients = isinstance(event, ClientTrained | ClientEvaluated | RoundFinished)
            if stop.requested and between_clients:
                stopped = Interrupted(f"stopped; everything up to here is saved. Go on with: {go_on}")
                cast("Generator[Any, Any, Any]", events).throw(stopped)


class _StopFlag:
    """Set by the first Ctrl-C."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def _stop_request() -> Iterator[_StopFlag]:
    """The first Ctrl-C asks to stop after the client in hand; the second one stops at once."""
    flag = _StopFlag()

    def say(text: str) -> None:
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)

    def ask(signum: int, frame: FrameType | None) -> None:
        del frame
        if flag.requested:
            say("stopped at once; a run goes on after its last complete round with: sfedlora resume RUN_DIR")
            raise KeyboardInterrupt
        flag.requested = True
        say(f"stopping after the client in hand (signal {signum}); again to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


class _View(Protocol):
    def __enter__(self) -> object: ...
    def __exit__(self, *args: object) -> None: ...
    def show(self, event: AnyEvent) -> None: ...


def _describe(event: RoundFinished) -> str:
    record = event.record
    parts = [f"train loss {record['train_loss']:.4f}"]
    if record["eval_loss"] is not None:
        parts.append(f"validation loss {record['eval_loss']:.4f}")
    parts += [f"{name} {record[name]:.4g}" for name in ("perplexity", "accuracy") if record.get(name) is not None]
    if record["grad_norm_b"] is not None:
        parts.append(f"|grad B| {record['grad_norm_b']:.3g}")
    if record["excluded"]:
        parts.append(f"excluded {', '.join(record['excluded'])}")
    return ", ".join(parts)


def _describe_start(event: RunPrepared) -> list[str]:
    prepared = event.prepared
    config, federation = prepared.config, prepared.federation
    workers = "" if config.workers == 1 else f" in each of {config.workers} workers"
    lines = [
        f"{config.model.source}: {prepared.base.dtype}, {config.device}, {config.threads} threads{workers}",
        (
            f"{len(federation.splits)} clients, method {config.method.name}, {_describe_sizes(federation.sizes)}, "
            f"scaling {config.lora.scaling}, init {config.lora.init}, "
            f"effective clients {federation.effective_clients:.4g}"
        ),
    ]
    if prepared.base.new_modules:
        lines.append(f"trained in full and saved with the adapter: {', '.join(prepared.base.new_modules)}")
    return [*lines, *describe_plan(prepared)] if event.first_round == 1 else lines


def _describe_sizes(sizes: LoraSizes) -> str:
    own = sizes.clients.values()
    if not own:
        return f"rank {sizes.server.rank} with gamma {sizes.server.scaling:.4g}"
    ranks, gammas = sorted(size.rank for size in own), sorted(size.scaling for size in own)
    return f"ranks {ranks[0]} to {ranks[-1]} with gamma {gammas[-1]:.4g} to {gammas[0]:.4g}"


class _LineView:
    """One line per round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._num_rounds = 0

    def __enter__(self) -> _LineView:
        return self

    def __exit__(self, *args: object) -> None:
        del args

    def show(self, event: AnyEvent) -> None:
        if isinstance(event, CellStarted):
            state = "finished before, skipped" if event.skipped else "running"
            self._say(f"cell {event.index + 1}/{event.num_cells}: {event.cell.name} ({state})")
        elif isinstance(event, RunPrepared):
            self._num_rounds = event.prepared.config.rounds.num_rounds
            for line in _describe_start(event):
                self._say(line)
        elif isinstance(event, ClientTrained) and event.error is not None:
            self._say(f"excluded: {event.error}")
        elif isinstance(event, RoundFinished):
            self._say(f"round {event.record['round_num']}/{self._num_rounds}: {_describe(event)}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _BarView:
    """Bars for rounds, clients of the round, and evaluation; finished rounds as lines above them."""

    def __init__(self, console: Console) -> None:
        self._lines = _LineView(console)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._evaluated = 0

    def __enter__(self) -> _BarView:
        self._progress.start()
        return self

    def __exit__(self, *args: object) -> None:
        del args
        self._progress.stop()

    def show(self, event: AnyEvent) -> None:
        self._lines.show(event)
        if isinstance(event, RunPrepared):
            self._begin(event)
        elif self._rounds is None or self._clients is None or self._evaluation is None:
            return
        elif isinstance(event, RoundStarted):
            self._progress.reset(self._clients, total=len(event.cohort))
            self._progress.reset(self._evaluation, total=None)
            self._evaluated = 0
        elif isinstance(event, ClientTrained):
            self._progress.advance(self._clients)
        elif isinstance(event, ClientEvaluated):
            if self._evaluated == event.num_evaluated:  # the next split or round of the same clients
                self._evaluated = 0
                self._progress.reset(self._evaluation)
            self._evaluated += 1
            self._progress.update(self._evaluation, total=event.num_evaluated, completed=self._evaluated)
        elif isinstance(event, RoundFinished):
            self._progress.advance(self._rounds)

    def _begin(self, event: RunPrepared) -> None:
        for task in list(self._progress.task_ids):
            self._progress.remove_task(task)
        total = event.prepared.config.rounds.num_rounds
        self._rounds = self._progress.add_task("rounds", total=total, completed=event.first_round - 1)
        self._clients = self._progress.add_task("clients", total=None)
        self._evaluation = self._progress.add_task("evaluation", total=None)
