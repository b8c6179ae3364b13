"""The site's long-lived process: the same answers as without it, one base model, and it comes back when it dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sfedlora
from flower.federations import exchange_of, small_config, small_files
from flower.local_exchange import facts
from sfedlora.errors import ConfigError
from sfedlora.flower import trainer
from sfedlora.flower.envelope import Envelope, MessageError
from sfedlora.flower.server import serve
from sfedlora.flower.trainer import ask_trainer

CLIENT = "ai"
TINY = Path(sfedlora.__file__).parent / "assets" / "tiny_llama"


@dataclass(frozen=True)
class Talk:
    """What was said between a server and a site that has no trainer."""

    config_path: Path
    data: Path
    questions: list[Envelope]
    answers: list[Envelope]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    tmp_path = tmp_path_factory.mktemp("talk")
    config = small_config(tmp_path)
    files = small_files(tmp_path)
    exchange = exchange_of(config, files, tmp_path / "sites")
    serve(config, exchange, resume=False, log=lambda _: None)
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    said = [(way, envelope) for node, way, envelope in exchange.sent if node == 1]
    questions = [envelope for way, envelope in said if way == "down"]
    return Talk(path, files[CLIENT], questions, [envelope for way, envelope in said if way == "up"])


class Place:
    """Where trainers of a test live; the ones that are alive at its end are killed."""

    def __init__(self, folder: Path, state_dir: Path) -> None:
        self.sockets = folder / f"sfedlora-trainers-{os.getuid()}"
        self.state_dir = state_dir

    def settings(self, talk: Talk, **node: Any) -> str:
        own = {"client-id": CLIENT, "data": str(talk.data), "state-dir": str(self.state_dir), **node}
        return json.dumps({"config": str(talk.config_path), "run": {}, "node": own})

    def pids(self) -> list[int]:
        """Process ids of the trainers that listen."""
        return [pid for path in self.sockets.glob("*.sock") if (pid := _listener(path))]

    def log(self) -> str:
        return (self.state_dir / "trainer.log").read_text()


def _listener(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return 0
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


def end(pid: int) -> None:
    """Kill a trainer and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="sfed") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        given = Place(Path(folder), tmp_path / "state")
        yield given
        for pid in given.pids():
            end(pid)


def test_answers_are_those_without_it_also_when_it_is_killed_and_the_base_model_is_loaded_once(
    talk: Talk, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(TINY, model)
    shutil.copy(talk.data, data)
    settings = place.settings(talk, model=str(model), data=str(data))
    started, popen = list[object](), subprocess.Popen

    def counted(*args: Any, **options: Any) -> Any:
        started.append(args)
        return popen(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", counted)
    with ThreadPoolExecutor(2) as pool:  # of two that ask at the same time one starts it
        first = list(pool.map(lambda question: ask_trainer(settings, question), talk.questions[:1] * 2))
        assert first == talk.answers[:1] * 2
        assert len(started) == 1
        [pid] = place.pids()
        os.kill(pid, signal.SIGSTOP)  # it takes the message and does not come to answer it
        asked = pool.submit(ask_trainer, settings, talk.questions[1])
        time.sleep(0.3)
        assert not asked.done()
        end(pid)
        assert asked.result(timeout=120) == talk.answers[1]
    assert "the trainer died and is started again" in capsys.readouterr().out
    [pid] = place.pids()
    shutil.rmtree(model)  # whatever is not in memory now is lost
    data.unlink()
    _throw_garbage_at(next(place.sockets.glob("*.sock")))
    assert [ask_trainer(settings, question) for question in talk.questions[2:]] == talk.answers[2:]
    assert place.pids() == [pid]
    assert len(started) == 2
    assert stat.S_IMODE(place.sockets.stat().st_mode) == 0o700
    for path in (*place.sockets.glob("*.sock"), place.state_dir / "trainer.log"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def _header(values: object) -> bytes:
    content = json.dumps(values).encode()
    return struct.pack("<Q", len(content)) + content


GARBAGE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\0" * 8,
    b"\xff" * 64,
    struct.pack("<Q", 5) + b"{{{{{",
    struct.pack("<Q", 100_000) + b"[" * 100_000,
    struct.pack("<Q", 3) + b"\xff\xfe\xfd",
    _header([]),
    _header({}),
    _header({"facts": 1, "dtype": "float32", "num_bytes": 0}),
    _header({"facts": "{}", "dtype": "float64", "num_bytes": 0}),
    _header({"facts": "{}", "dtype": {}, "num_bytes": 0}),
    _header({"facts": "{}", "dtype": "float32", "num_bytes": -1}),
    _header({"facts": "{}", "dtype": "float32", "num_bytes": 2**62}),
    _header({"facts": "{}", "dtype": "float32", "num_bytes": 10**30}),
    _header({"facts": "{}", "dtype": "float32", "num_bytes": 10}) + b"short",
    _header({"facts": "\ud800", "dtype": "float32", "num_bytes": 0}),
]


def _throw_garbage_at(path: Path) -> None:
    for content in GARBAGE:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            with suppress(BrokenPipeError):
                connection.sendall(content)


@pytest.mark.slow
def test_one_that_nobody_asks_ends_and_another_goes_on(talk: Talk, place: Place) -> None:
    settings = place.settings(talk, **{"trainer-idle-seconds": 1.0})
    assert ask_trainer(settings, talk.questions[0]) == talk.answers[0]
    until = time.monotonic() + 60
    while list(place.sockets.glob("*.sock")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "nobody asked for 1 s" in place.log()
    assert ask_trainer(settings, talk.questions[1]) == talk.answers[1]


@pytest.mark.slow
def test_one_that_is_killed_after_every_answer_changes_nothing(talk: Talk, place: Place) -> None:
    settings, found = place.settings(talk), []
    for question in talk.questions:
        found.append(ask_trainer(settings, question))
        for pid in place.pids():
            end(pid)
    assert found == talk.answers


@pytest.mark.slow
def test_settings_that_cannot_be_used_are_told_in_its_log(
    talk: Talk, place: Place, flower_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from flwr.app import Context, Message, RecordDict

    from sfedlora.flower.client_app import make_client_app
    from sfedlora.flower.records import from_records, to_records

    node = json.loads(place.settings(talk, device="patients"))["node"]
    context = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config={})
    message = Message(to_records(talk.questions[0]), 7, "query")
    answer = from_records(make_client_app(talk.config_path)(message, context).content)
    assert facts(answer) == {"kind": "failure", "code": "settings"}
    assert "device" in place.log()
    assert "'patients'" in place.log()
    assert f"{place.state_dir / 'trainer.log'} says why" in capsys.readouterr().out
    assert place.pids() == []


def test_a_state_directory_that_cannot_be_used_is_named(talk: Talk, place: Place) -> None:
    place.state_dir.write_text("")
    with pytest.raises(ConfigError, match=r"state-dir=.* cannot be used"):
        ask_trainer(place.settings(talk), talk.questions[0])


def test_its_log_is_not_written_through_a_link(talk: Talk, place: Place, tmp_path: Path) -> None:
    place.state_dir.mkdir()
    (place.state_dir / "trainer.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"state-dir=.* cannot be used"):
        ask_trainer(place.settings(talk), talk.questions[0])
    assert not (tmp_path / "elsewhere").exists()


def _open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


def _link(folder: Path) -> None:
    (folder.parent / "target").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "target")


@pytest.mark.parametrize("kind", ["open", "link", "dangling", "file", "foreign"])
def test_a_folder_of_somebody_else_is_refused(
    kind: str, talk: Talk, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    match kind:
        case "open":
            _open(place.sockets)
        case "link":
            _link(place.sockets)
        case "dangling":
            place.sockets.symlink_to(place.sockets.parent / "nothing")
        case "file":
            place.sockets.touch(mode=0o700)
        case _:
            place.sockets.with_name("sfedlora-trainers-12345").mkdir(mode=0o700)
            monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="is not a folder that only this user can use"):
        ask_trainer(place.settings(talk), talk.questions[0])
    assert not place.state_dir.exists()


def test_a_long_folder_for_temporary_files_makes_no_socket_that_no_system_takes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    paths = {trainer._socket_path(settings) for settings in ("a", "b")}
    assert len(paths) == 2
    for path in paths:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        path.unlink()


def test_a_folder_that_cannot_be_made_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place.sockets.parent / "nothing"))
    with pytest.raises(ConfigError, match="cannot be made"):
        trainer._socket_path("a")


def test_another_user_s_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        trainer._require_own(one)
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        with pytest.raises(MessageError, match=f"a process of user {user}; expected one of user {user + 1}"):
            trainer._require_own(one)


@pytest.mark.parametrize("content", GARBAGE)
def test_whatever_is_no_message_is_refused(content: bytes) -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    one.settimeout(10)

    def write() -> None:
        with other, suppress(BrokenPipeError, ConnectionResetError):
            other.sendall(content)

    thread = threading.Thread(target=write)
    thread.start()
    with one:
        try:
            envelope = trainer._receive(one)
        except (MessageError, EOFError):
            envelope = None
    thread.join(timeout=10)
    assert envelope is None or envelope.facts == "\ud800"


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_an_envelope_goes_through_the_socket_as_it_is(size: int) -> None:
    envelope = Envelope('{"é": "\\u0000"}', "bfloat16", os.urandom(size))
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        thread = threading.Thread(target=trainer._send, args=(other, envelope))
        thread.start()
        assert trainer._receive(one) == envelope
        thread.join(timeout=10)
