"""A site of a federation across sites, killed at every operation on what it keeps, while the server goes on.

    server with one site, a process --- supervisor, this process --- the other site, a process

The supervisor hands messages on and starts the site again when it is dead, as Flower does in two ways:

- `ask_again`: only the site's trainer died, so the same message is handed to the new one. Nothing may differ at all
  from a federation without faults.
- otherwise the node died, so the server is told that there is no answer, and the site sits the message out. The server
  must end with the bytes of a federation in which that answer was lost and nobody died. So must the site; it may have
  had the work done or not, so each round, key and adapter that it keeps is as in one of the two federations where the
  message was lost on the way there, or the answer on the way back.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from crash.deployment import SITES, Deployment, files_below, serve_here, server_files
from crash.faults import Fault, watch
from crash.harness import (
    KILLED,
    MAX_SECONDS,
    Counts,
    Life,
    Plan,
    difference,
    leaving,
    read_life,
    second_fault,
    write_life,
)
from flower.local_exchange import Answer
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.exchange import Lost

__all__ = ["NODES", "Node", "node_campaign"]

VICTIM, OTHER = SITES
ROUNDS = {"rounds__num_rounds": 4}
"""Enough that a site removes a round."""
Files = Mapping[str, bytes]
Groups = Mapping[str, Files]


@dataclass(frozen=True)
class Node:
    """A site with a server and another site.

    Attributes:
        deployment: the federation.
        ask_again: whether a message whose site died is given to the next one.
    """

    deployment: Deployment
    ask_again: bool


@dataclass(frozen=True)
class _End:
    """What a federation left.

    Attributes:
        server: files of the server and of the site that is not killed.
        site: what the other keeps: round, key or adapter -> its files.
        lost: the messages that had no answer, counted from 0.
        lives: how each process of the site ended.
        num_messages: to the site.
    """

    server: Files
    site: Groups
    lost: frozenset[int]
    lives: Sequence[Life]
    num_messages: int


def node_campaign(node: Node, work: Path, plan: Plan, say: Callable[[str], None]) -> Counts:
    """Try the faults of a plan on a site, as `harness.campaign` does on a program.

    Args:
        node: the federation.
        work: an empty folder.
        plan: which faults.
        say: called with a line about every mismatch.
    """
    (work / "shared").mkdir(parents=True)
    node.deployment.prepare(work / "shared")
    references = _References(node, work)
    [life] = references.undisturbed.lives
    counts = Counts(fault_points=life.num_fault_points)
    rng = random.Random(plan.seed)  # noqa: S311 - a choice of tests
    for fault in plan.choose(life, rng):
        second = second_fault(rng)
        counts.faults_tried += 1
        faults = [fault, *([] if second is None else [second])]
        try:
            end = _Supervisor(node, work, faults).run()
            problem = references.problem(end)
        except RuntimeError as error:
            counts.mismatches.append(f"{fault} {life.at(fault)}, then {second}: {error}")
            say(counts.mismatches[-1])
            continue
        killed = [one for one, ended in zip(faults, end.lives, strict=False) if ended.code == KILLED]
        counts.kills += len(killed)
        counts.power_losses += sum(one.power_loss for one in killed)
        counts.resumes += len(end.lives) - 1
        counts.resumes_killed += len(killed) == 2
        if problem:
            counts.mismatches.append(f"{fault} {life.at(fault)}, then {second}, lost {sorted(end.lost)}: {problem}")
            say(counts.mismatches[-1])
    return counts


@dataclass
class _References:
    """Federations in which nobody dies, made when they are needed."""

    node: Node
    work: Path
    known: dict[tuple[frozenset[int], bool], _End] = field(default_factory=dict)

    @property
    def undisturbed(self) -> _End:
        return self.of(frozenset(), delivered=True)

    def of(self, lost: frozenset[int], *, delivered: bool) -> _End:
        """The federation in which the answers to some messages are lost, after the site had the messages or before."""
        key = lost, delivered
        if key not in self.known:
            self.known[key] = _Supervisor(self.node, self.work, (), drop=lost, deliver=delivered).run()
        return self.known[key]

    def problem(self, end: _End) -> str:
        """What a federation with faults must not have left, or nothing."""
        if not end.lost:
            expected = self.undisturbed
            return difference(expected.server, end.server) or difference(_flat(expected.site), _flat(end.site))
        references = [self.of(end.lost, delivered=delivered) for delivered in (False, True)]
        problems = [difference(one.server, end.server) for one in references]
        if any(problems):
            return f"the server {next(filter(None, problems))}"
        is_last = max(end.lost) == self.undisturbed.num_messages - 1
        return "; ".join(_site_problems(end.site, [one.site for one in references], leftovers=is_last))


def _site_problems(found: Groups, expected: Sequence[Groups], *, leftovers: bool) -> Iterator[str]:
    """What a site keeps that it has in neither reference; half-written things may stay where no message follows."""
    for name in sorted({*found, *(name for one in expected for name in one)}):
        if leftovers and name.startswith(".") and name.endswith(".tmp"):
            continue
        if found.get(name) not in [one.get(name) for one in expected]:
            yield f"the site differs in {name}"


def _flat(groups: Groups) -> Files:
    return {f"{group}/{name}": content for group, files in groups.items() for name, content in files.items()}


class _Supervisor:
    """Owner of the processes of one federation."""

    def __init__(
        self,
        node: Node,
        work: Path,
        faults: Sequence[Fault],
        *,
        drop: frozenset[int] = frozenset(),
        deliver: bool = True,
    ) -> None:
        """Nothing runs yet.

        Args:
            node: the federation.
            work: folder with `shared`.
            faults: of the site's first processes; those after them have none.
            drop: messages whose answer is lost.
            deliver: whether the site gets those messages.
        """
        self._node, self._work, self._faults = node, work, list(faults)
        self._drop, self._deliver = drop, deliver
        self._folder = work / "run"
        self._lives: list[Life] = []
        self._lost: set[int] = set()
        self._pid, self._begin = 0, 0.0
        self._seconds_left: float | None = None
        self._site: Connection

    def run(self) -> _End:
        """The federation from its first message to its end.

        Raises:
            RuntimeError: a process failed by itself.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "node").mkdir(parents=True)
        for stale in ("error.txt", "server-error.txt"):
            (self._work / stale).unlink(missing_ok=True)
        server, pid = self._start_server()
        self._start_site()
        number = 0
        try:
            while True:
                try:
                    message = server.recv()
                except EOFError:
                    break
                server.send(self._answer(number, message))
                number += 1
        finally:
            server.close()
            self._stop_site()
            _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"the server failed:\n{(self._work / 'server-error.txt').read_text(encoding='utf-8')}")
        return self._end(number)

    def _end(self, num_messages: int) -> _End:
        others = {f"other/{name}": one for name, one in files_below(self._folder / "other").items()}
        site: dict[str, dict[str, bytes]] = {}
        for name, content in files_below(self._folder / "node").items():
            _, _, group, *rest = Path(name).parts  # federation, client, round
            site.setdefault(group, {})["/".join(rest)] = content
        lost = frozenset(self._lost)
        return _End({**server_files(self._folder / "server"), **others}, site, lost, tuple(self._lives), num_messages)

    def _answer(self, number: int, message: tuple[str, str, bytes]) -> tuple[str, str, bytes] | None:
        """The site's answer; None where there is none."""
        if number in self._drop:
            self._lost.add(number)
            if self._deliver:
                self._ask(message)
            return None
        for _ in range(1 + len(self._faults) + 1):
            answer = self._ask(message)
            if answer is not None:
                return answer
            self._bury()
            self._start_site()
            if not self._node.ask_again:
                self._lost.add(number)
                return None
        raise RuntimeError("the site died too often")

    def _ask(self, message: tuple[str, str, bytes]) -> tuple[str, str, bytes] | None:
        """Hand a message on; None where the site died over it."""
        begin = time.monotonic()
        try:
            self._site.send(message)
            if not self._site.poll(MAX_SECONDS if self._seconds_left is None else max(0.0, self._seconds_left)):
                os.kill(self._pid, signal.SIGKILL)
                return None
            answer: tuple[str, str, bytes] = self._site.recv()
        except (EOFError, ConnectionError):
            return None
        if self._seconds_left is not None:
            self._seconds_left -= time.monotonic() - begin
        return answer

    def _start_server(self) -> tuple[Connection, int]:
        here, there = Pipe()
        pid = os.fork()
        if pid == 0:
            with leaving(self._work / "server-error.txt"):
                here.close()
                deployment, shared = self._node.deployment, self._work / "shared"
                other = deployment.site(shared, OTHER, self._folder / "other")
                serve_here(deployment.config(shared, self._folder / "server"), {1: _remote(there), 2: other})
        there.close()
        return here, pid

    def _start_site(self) -> None:
        fault = self._faults.pop(0) if self._faults else None
        backups = self._work / "backups"
        shutil.rmtree(backups, ignore_errors=True)
        backups.mkdir()
        (self._work / "report.json").unlink(missing_ok=True)
        self._site, there = Pipe()
        self._begin = time.monotonic()
        self._seconds_left = fault.at if fault is not None and fault.kind == "time" else None
        self._pid = os.fork()
        if self._pid == 0:
            with leaving(self._work / "error.txt"):
                self._site.close()
                self._live(there, fault, backups)
        there.close()

    def _live(self, messages: Connection, fault: Fault | None, backups: Path) -> None:
        """One life of the site; it ends with the connection."""
        watched = watch(fault, self._folder / "node", backups)
        answer = self._node.deployment.site(self._work / "shared", VICTIM, self._folder / "node")
        while True:
            try:
                message = Envelope(*messages.recv())
            except EOFError:
                break
            watched.boundary()
            given = answer(message)
            watched.boundary()
            if isinstance(given, Envelope):
                messages.send((given.facts, given.dtype, given.data))
        write_life(self._work / "report.json", watched)

    def _stop_site(self) -> None:
        self._site.close()
        self._bury(killed=False)

    def _bury(self, *, killed: bool = True) -> None:
        """Wait for the end of the site's process.

        Raises:
            RuntimeError: it ended in another way than it should.
        """
        if not self._pid:
            return
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        code = os.waitstatus_to_exitcode(status)
        self._lives.append(read_life(self._work / "report.json", code, time.monotonic() - self._begin))
        if code != (KILLED if killed else 0):
            error = self._work / "error.txt"
            text = error.read_text(encoding="utf-8") if error.exists() else ""
            raise RuntimeError(f"the site ended with {code}: {text}")


def _remote(connection: Connection) -> Callable[[Envelope], Answer]:
    """The site in another process, as an exchange takes it."""

    def ask(envelope: Envelope) -> Answer:
        connection.send((envelope.facts, envelope.dtype, envelope.data))
        answer = connection.recv()
        return Lost("the node did not answer") if answer is None else Envelope(*answer)

    return ask


NODES: Mapping[str, Node] = {
    f"Flower node, {name}, {'asked again' if ask_again else 'sits out'}": Node(deployment, ask_again)
    for name, deployment in (
        ("fedsa, kept moments", Deployment({"local__optimizer_state": "keep", **ROUNDS})),
        ("personal heads", Deployment({"method__head": "personal", **ROUNDS}, sentiment=True)),
    )
    for ask_again in (True, False)
}
