"""Clients dealt over worker processes: the bits of one process, whoever dies."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sfedlora import RunConfig, RunResult, run
from sfedlora.errors import ClientError, ConfigError, Interrupted, RunError
from sfedlora.experiment import RunEvent, RunPrepared, resume, run_events
from sfedlora.federation.client import ClientOutcome, ClientWork
from sfedlora.federation.eval_work import evaluate_work, split_works
from sfedlora.federation.round import ClientTrained, RoundStarted
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.costs import Costs
from sfedlora.federation.runners.packing import pack
from sfedlora.federation.runners.ray_cluster import Cluster, WorkerResources
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.runners.worker import Worker, receive, send, send_evaluation
from sfedlora.federation.runners.workers import WorkersRunner, running
from sfedlora.federation.state import Federation, initial_state, starting_adapter
from sfedlora.setup import prepare
from sfedlora.setup.resolve import resolve_workers
from sfedlora.types import Part
from support.command_line import TINY, command, sfedlora, write_config
from support.processes import wait_until
from support.tiny_federation import TRAINING, tiny_federation

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes")
RESOURCES = WorkerResources(num_workers=2, num_cpus=1, num_gpus=0)


def _config(folder: Path, **sections: object) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", **{"runner": "serial", "output": str(folder / "run"), **sections})


def descendants() -> set[int]:
    """Process ids of all that this process started, directly or not, and that have not ended."""
    stats = [stat for path in Path("/proc").glob("[0-9]*/stat") if (stat := _read(path))]
    fields = {int(stat.split()[0]): stat.rpartition(")")[2].split() for stat in stats}
    parents = {pid: int(parent) for pid, (state, parent, *_) in fields.items() if state != "Z"}
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # a process that has ended meanwhile
        return ""


def assert_same_run(one: Path, other: Path) -> None:
    """Adapters and checkpoints byte for byte; metrics but for times."""
    for kind in ("adapters", "checkpoints"):
        files = sorted(path.relative_to(one) for path in (one / kind).rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(other) for path in (other / kind).rglob("*") if path.is_file())
        assert files
        for name in files:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert _untimed(one) == _untimed(other)
    assert (one / "summary.json").read_bytes() == (other / "summary.json").read_bytes()


def _untimed(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in records]


def kill_a_worker(events: Iterator[RunEvent], *, in_round: int) -> RunResult:
    """Drive a run in which a worker dies after it was given a client.

    It is stopped before the round and killed when another one has finished a client, so it cannot have finished.
    """
    runner: Runner | None = None
    victim = 0
    for event in events:
        if isinstance(event, RunPrepared):
            runner = event.prepared.federation.runner
        if isinstance(event, RoundStarted) and event.round_num == in_round:
            assert isinstance(runner, WorkersRunner)
            victim = next(place.pid for place in runner.places if place is not None)
            os.kill(victim, signal.SIGSTOP)
        if isinstance(event, ClientTrained) and victim:
            os.kill(victim, signal.SIGKILL)
            victim = 0
        if isinstance(event, RunResult):
            return event
    raise AssertionError("the run has no result")


@linux
def test_two_workers_give_the_bits_of_one_process_though_one_is_killed_in_a_round(tmp_path: Path) -> None:
    one = run(RunConfig.load(_config(tmp_path / "one")))
    before = descendants()
    death = r"worker . \(process \d+ on .*\) died; Ray starts another, its clients run again"
    with pytest.warns(UserWarning, match=death):
        two = kill_a_worker(run_events(RunConfig.load(_config(tmp_path / "two", workers=2))), in_round=2)
    assert_same_run(one.run_dir, two.run_dir)
    assert not two.metrics[1]["excluded"]
    assert descendants() <= before


@linux
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedit", "fedex"])
def test_stacks_and_what_they_share_are_the_same_on_two_workers(method: str, tmp_path: Path) -> None:
    """Five clients in stacks of two, kept moments, dropout, base deltas, and a file that all are evaluated on."""
    rows = [{"prompt": f"what is {number}", "response": f"{number} is a number"} for number in range(12)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections: dict[str, object] = {
        "preset": None,
        "method": {"name": method},
        "data": {"validation": str(tmp_path / "more.jsonl")},
        "partition": {"num_clients": 5},
        "rounds": {"num_rounds": 3},
        "lora": {"rank": 4, "dropout": 0.1, "scaling": "lora"},
        "local": {"optimizer_state": "keep", "local_steps": None, "local_epochs": 1},
        "runner": "batched",
        "clients_per_batch": 2,
    }
    one = run(RunConfig.load(_config(tmp_path / "one", **sections)))
    two = run(RunConfig.load(_config(tmp_path / "two", **sections, workers=2)))
    assert one.metrics[0]["external_validation"]
    assert_same_run(one.run_dir, two.run_dir)


@linux
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    sections: dict[str, object] = {"partition": {"num_clients": 4}, "local": {"optimizer_state": "keep"}}
    one = run(RunConfig.load(_config(tmp_path / "one", **sections)))
    two = tmp_path / "two" / "run"
    events = run_events(RunConfig.load(_config(tmp_path / "two", **sections, workers=2)))
    next(event for event in events if isinstance(event, ClientTrained) and event.round_num == 2)
    with pytest.raises(Interrupted):
        cast("Any", events).throw(Interrupted("stop"))
    config = (two / "config.yaml").read_text(encoding="utf-8")
    (two / "config.yaml").write_text(config.replace("workers: 2\n", "workers: 1\n"), encoding="utf-8")
    assert_same_run(one.run_dir, resume(two).run_dir)


@linux
@pytest.mark.slow
def test_control_c_in_a_terminal_stops_a_run_that_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal reaches the run, its workers and all of Ray."""
    sections: dict[str, object] = {"rounds": {"num_rounds": 3}, "local": {"local_steps": 30}}
    one = run(RunConfig.load(_config(tmp_path / "one", **sections)))
    two = tmp_path / "two" / "run"
    arguments = command("run", _config(tmp_path / "two", **sections, workers=2))
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until((two / "checkpoints" / "round-000001").exists)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"sfedlora resume {two}" in err
    wait_until(lambda: not _is_group(process.pid), seconds=30)
    assert sfedlora(capsys, "resume", two).code == 0
    assert_same_run(one.run_dir, two)


def _is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def _poisoned(values: dict[str, Any], poison: str) -> Callable[[], Federation]:
    """Makes a federation whose process dies when it is to train one client. Ray sends functions of functions whole."""

    def make() -> Federation:
        import os
        from dataclasses import replace

        from sfedlora import RunConfig
        from sfedlora.setup import prepare

        federation = prepare(RunConfig.from_mapping(values)).federation

        class Poisoned:
            clients_per_batch = federation.runner.clients_per_batch
            stack_at_most = federation.runner.stack_at_most
            order = federation.runner.order

            def run_cohort(self, cohort: Any) -> Any:
                works = list(cohort)
                if any(work.client_id == poison for work in works):
                    os._exit(1)
                return federation.runner.run_cohort(works)

        return replace(federation, runner=Poisoned())

    return make


@linux
@pytest.mark.slow
@pytest.mark.parametrize("stack", [1, 3])
def test_a_client_that_costs_two_workers_is_left_out(stack: int, tmp_path: Path) -> None:
    values: dict[str, Any] = copy.deepcopy(dict(TINY)) | {"runner": "serial", "output": str(tmp_path / "run")}
    if stack > 1:
        values |= {"runner": "batched", "clients_per_batch": stack}
    federation = prepare(RunConfig.from_mapping(values)).federation
    assert isinstance(federation.runner, SerialRunner | BatchedRunner)
    members = dict(federation.participants)
    alone = {result.client_id: result for result in _run(federation, federation.runner)}
    poison = sorted(members)[1]
    runner = WorkersRunner(federation.runner, RESOURCES, _poisoned(values, poison))
    try:
        with pytest.warns(UserWarning, match="died; Ray starts another"):
            results = {result.client_id: result for result in _run(federation, runner)}
    finally:
        runner.close()
    error = results.pop(poison)
    assert isinstance(error, ClientError)
    assert error.reason == "2 workers died while they trained it (out of memory?)"
    assert set(results) == set(members) - {poison}
    for client_id, result in results.items():
        expected = alone[client_id]
        assert isinstance(result, ClientOutcome)
        assert isinstance(expected, ClientOutcome)
        for name, tensor in expected.tensors.items():
            assert torch.allclose(result.tensors[name], tensor, atol=0 if stack == 1 else 1e-5), name


def _run(federation: Federation, runner: Runner) -> list[ClientOutcome | ClientError]:
    return list(runner.run_cohort(_works(federation, runner.order(dict(federation.participants)))))


def _works(federation: Federation, client_ids: list[str]) -> list[ClientWork]:
    state = initial_state(federation)
    return [
        ClientWork(
            client_id=client_id,
            round_num=1,
            start=starting_adapter(federation, state, client_id),
            trained=frozenset({Part.A, Part.B}),
            size=federation.sizes.of(client_id),
            learning_rate=1e-2,
            indices=federation.participants[client_id],
            optimizer_state={},
        )
        for client_id in client_ids
    ]


@linux
@pytest.mark.slow
def test_workers_that_cannot_start_end_the_run_with_one_message(tmp_path: Path) -> None:
    """On a connection to Ray that was there before and outlives the runs."""
    federation = tiny_federation()
    assert isinstance(federation.runner, SerialRunner)
    one = WorkerResources(1, 1, 0)
    cluster = Cluster(one)
    try:
        dies = WorkersRunner(federation.runner, one, partial(os._exit, 1))
        with (
            pytest.warns(UserWarning, match=r"worker 1 died while it loaded model and data; (Ray|it is)"),
            pytest.raises(RunError, match="all 1 workers died while they loaded model and data, so none is left"),
            running(dies),
        ):
            _run(federation, dies)
        refuses = WorkersRunner(federation.runner, one, partial(RunConfig.load, tmp_path / "none.yaml"))  # type: ignore[arg-type]
        with (
            pytest.raises(ConfigError, match=r"worker 1 cannot run this federation: .*none.yaml: no such"),
            running(refuses),
        ):
            _run(federation, refuses)
        breaks = WorkersRunner(federation.runner, one, partial(int, "x"))  # type: ignore[arg-type]
        with pytest.raises(RunError, match="worker 1 could not load model and data: ValueError"), running(breaks):
            _run(federation, breaks)
        many = WorkersRunner(federation.runner, WorkerResources(2, 1, 0), tiny_federation)
        with (
            pytest.raises(ConfigError, match="2 workers with 1 CPUs each need 2, but the Ray cluster has 1"),
            running(many),
        ):
            pass
        assert cluster.ray.is_initialized()
    finally:
        cluster.close()
    assert not cluster.ray.is_initialized()


def test_an_address_without_a_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address, reason in (
        (f"127.0.0.1:{port}", "ConnectionRefusedError"),
        ("ray://127.0.0.1:10001", "goes through a proxy"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS: .*{re.escape(address)}.*{reason}"):
            Cluster(RESOURCES)
    assert not {"RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & os.environ.keys()


@pytest.fixture
def keeps_signals() -> Iterator[None]:
    """A worker ignores Ctrl-C; this process must not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keeps_signals")
def test_a_worker_gives_what_the_runner_gives() -> None:
    """Outcomes and errors as they were, after a pickle both ways; a diverging client is among them."""
    federation = tiny_federation(sizes={"a": 9, "b": 14})
    works = _works(federation, ["a", "b"])
    huge = {name: tensor * 1e30 for name, tensor in works[1].start.items()}
    works[1] = ClientWork(**{**vars(works[1]), "start": huge})
    outcome, error = federation.runner.run_cohort(works)
    assert isinstance(outcome, ClientOutcome)
    assert isinstance(error, ClientError)
    worker = Worker(partial(tiny_federation, sizes={"a": 9, "b": 14}))
    assert worker.ready().pid == os.getpid()
    sent = pickle.loads(pickle.dumps((tuple(map(send, works)), pack({}))))  # noqa: S301 - made here
    reply = pickle.loads(pickle.dumps(worker.train(*sent)))  # noqa: S301
    assert (reply.clients_per_batch, reply.warnings) == (1, ())
    assert reply.seconds > 0
    back, failed = map(receive, reply.results)
    assert isinstance(back, ClientOutcome)
    assert isinstance(failed, ClientError)
    assert (str(failed), vars(failed)) == (str(error), vars(error))
    assert back.metrics == outcome.metrics
    assert (back.client_id, back.round_num, back.num_examples) == ("a", 1, 9)
    assert list(back.tensors) == list(outcome.tensors)
    for name, tensor in outcome.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name
    [work] = split_works(federation, initial_state(federation), "test", ["b"])
    evaluation = pickle.loads(pickle.dumps((send_evaluation(work), pack({}))))  # noqa: S301
    assert worker.evaluate(*evaluation).results == evaluate_work(federation, work)


def test_stacks_are_those_of_one_process_and_the_expensive_ones_come_first() -> None:
    federation = tiny_federation(sizes={name: 4 + 3 * at for at, name in enumerate("abcde")})
    assert isinstance(federation.runner, SerialRunner)
    cohort = dict(federation.participants)
    for inner in (federation.runner, BatchedRunner(federation.runner.setup, 2)):
        runner = WorkersRunner(inner, RESOURCES, tiny_federation)
        own, costs = inner.order(cohort), Costs(inner.setup.data.lengths, inner.setup.training).of(cohort)
        stacks = [own[at : at + inner.clients_per_batch] for at in range(0, 5, inner.clients_per_batch)]
        full = [stack for stack in stacks if len(stack) == inner.clients_per_batch]
        full.sort(key=lambda stack: -sum(costs[client_id] for client_id in stack))
        expected = [client_id for stack in [*full, *(s for s in stacks if s not in full)] for client_id in stack]
        assert runner.order(cohort) == expected
        assert runner.clients_per_batch == inner.clients_per_batch
        finished = full[0]
        assert runner.order(cohort, finished) == [one for one in expected if one not in finished]


def test_a_cost_is_tokens_until_seconds_are_known() -> None:
    lengths = np.array([2, 4, 6, 8])
    clients = {"a": [0, 1], "b": [2, 3], "c": [0, 3]}
    costs = Costs(lengths, TRAINING)  # 3 steps of 4 examples
    assert costs.of(clients) == {"a": 36, "b": 84, "c": 60}
    costs.note({"a": [0, 1], "c": [0, 3]}, 4.8)
    assert costs.of(clients) == pytest.approx({"a": 1.8, "b": 84 * 4.8 / 96, "c": 3.0})
    costs.note({"b": [2, 3]}, 1.0)
    assert costs.of(clients)["b"] == pytest.approx(1.0)


def test_workers_are_one_for_each_gpu_and_not_more_than_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cpu, cuda, second = torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")
    assert resolve_workers("auto", cpu, 10) == resolve_workers("auto", second, 10) == 1
    assert resolve_workers("auto", cuda, 10) == 4
    assert resolve_workers("auto", cuda, 3) == resolve_workers(8, cpu, 3) == 3
    with pytest.raises(ConfigError, match="2 workers need a GPU each, but device: cuda:1 is one"):
        resolve_workers(2, second, 10)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert resolve_workers("auto", cuda, 1) == 1
    with pytest.warns(UserWarning, match="would use 4 GPUs with Ray, which is not installed"):
        assert resolve_workers("auto", cuda, 10) == 1


def test_threads_are_shared_between_workers() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        values = {**TINY, "threads": None, "partition": {"scheme": "iid", "num_clients": 3}}
        assert prepare(RunConfig.from_mapping({**values, "workers": 2})).config.threads == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_without_ray_the_message_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = sfedlora(capsys, "run", _config(tmp_path), "workers=2")
    assert outcome.code == 2
    assert outcome.err.startswith(
        "error: workers: 2 workers need Ray, which is not installed; pip install 'sfedlora[ray]'"
    )
    assert not (tmp_path / "run").exists()


def test_a_worker_with_other_data_refuses(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {number}", "response": f"{number} is a number"} for number in range(60)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {**TINY, "data": {"source": str(source)}, "partition": {"scheme": "iid", "num_clients": 2}, "workers": 2}
    runner = prepare(RunConfig.from_mapping(values)).federation.runner
    assert isinstance(runner, WorkersRunner)
    assert runner.make_federation().runner.clients_per_batch == runner.clients_per_batch
    rows[0], rows[1] = rows[1], rows[0]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"another data than the run .* the same model and data under the same"):
        runner.make_federation()
