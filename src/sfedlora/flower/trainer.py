"""A site's long-lived process: it keeps base model and examples between messages, which Flower's processes do not.

    client process --- Unix socket, owner only --- trainer: `Site.answer`

The trainer starts when it is first asked, for one app at one node, and ends when nobody asks for a while. One that has
died is started again, and asked again: a question that is asked twice gets the same answer, because the site's state is
on the disk. A frame is the length of a JSON header, the header, and the bytes of the flat array.

Nothing here imports torch before the process is a trainer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfedlora.errors import ConfigError, SfedLoraError
from sfedlora.flower.envelope import ITEM_BYTES, Envelope, MessageError, failure

if TYPE_CHECKING:
    from sfedlora.flower.site import Site

__all__ = ["ask_trainer", "main"]

_LOG = logging.getLogger("sfedlora.flower.trainer")
START_SECONDS = 120.0
IDLE_SECONDS = 7200.0
"""Twice the default round deadline; `trainer-idle-seconds` in the node's settings."""
LAST_IDLE_SECONDS = 60.0
"""After the message that ends a run."""
QUESTION_SECONDS = 60.0
"""For a client process to hand over its message, and to take in the next piece of the answer."""
MAX_HEADER_BYTES = 32_000_000
MAX_SOCKET_PATH = 100
"""A little less than what systems allow."""
ATTEMPTS = 2


def ask_trainer(settings: str, envelope: Envelope) -> Envelope:
    """Hand a message to the site's trainer and return its answer.

    Args:
        settings: what `site.open_site` takes; it names the trainer too.
        envelope: the message.

    Raises:
        ConfigError: the trainer cannot be started.
    """
    path = _socket_path(settings)
    for attempt in range(1, ATTEMPTS + 1):
        with _connected(path, settings) as connection:
            try:
                _send(connection, envelope)
                return _receive(connection)
            except (OSError, EOFError):
                if attempt < ATTEMPTS:
                    print("sfedlora: the trainer died and is started again", flush=True)
    return failure("internal")


@contextmanager
def _connected(path: Path, settings: str) -> Iterator[socket.socket]:
    """A connection to the trainer, which is started where there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        if not _connects(connection, path):
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes that ask at the same time one starts it
                if not _connects(connection, path):
                    _start(connection, path, settings)
        yield connection


def _start(connection: socket.socket, path: Path, settings: str) -> None:
    node = json.loads(settings)["node"]
    state_dir = Path(str(node.get("state-dir", ".")))
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(state_dir / "trainer.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"node config: state-dir={state_dir} cannot be used ({error.strerror})") from None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "sfedlora.flower.trainer", str(path)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    if process.stdin is not None:
        process.stdin.write(settings.encode())
        process.stdin.close()
    end = time.monotonic() + START_SECONDS
    while not _connects(connection, path):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            process.wait()
            raise ConfigError(f"the trainer did not start; {state_dir / 'trainer.log'} says why")
        time.sleep(0.05)


def _connects(connection: socket.socket, path: Path) -> bool:
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def main() -> None:
    """Be the trainer of the settings on standard input, at the socket that the first argument names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path, settings = Path(sys.argv[1]), sys.stdin.read()
    from sfedlora.flower.site import open_site

    try:
        site = open_site(settings)
    except SfedLoraError as error:
        raise SystemExit(str(error)) from None
    idle_seconds = float(json.loads(settings)["node"].get("trainer-idle-seconds", IDLE_SECONDS))
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        os.umask(0o077)
        listener.bind(str(path))
        listener.listen()
        _LOG.info("trainer of site %s, process %d", json.loads(settings)["node"]["client-id"], os.getpid())
        try:
            _serve(listener, site, idle_seconds)
        finally:
            path.unlink(missing_ok=True)


def _serve(listener: socket.socket, site: Site, idle_seconds: float) -> None:
    """Answer one message after the other until nobody asks."""
    listener.settimeout(idle_seconds)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            _LOG.info("nobody asked for %g s; the trainer ends", listener.gettimeout())
            return
        with connection:
            connection.settimeout(QUESTION_SECONDS)
            try:
                _require_own(connection)
                question = _receive(connection)
                _send(connection, site.answer(question))
            except (OSError, EOFError, MessageError) as error:
                _LOG.warning("a question was not answered: %s", error)
                continue
        if '"write_adapter":true' in question.facts:
            listener.settimeout(min(idle_seconds, LAST_IDLE_SECONDS))


def _send(connection: socket.socket, envelope: Envelope) -> None:
    header = {"facts": envelope.facts, "dtype": envelope.dtype, "num_bytes": len(envelope.data)}
    content = json.dumps(header).encode()
    connection.sendall(struct.pack("<Q", len(content)) + content)
    connection.sendall(envelope.data)


def _receive(connection: socket.socket) -> Envelope:
    [length] = struct.unpack("<Q", _read(connection, 8))
    if length > MAX_HEADER_BYTES:
        raise MessageError(f"a header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
    try:
        header: Any = json.loads(_read(connection, length))
    except (ValueError, RecursionError):
        raise MessageError("a header that is no JSON") from None
    match header:
        case {"facts": str(facts), "dtype": str(dtype), "num_bytes": int(num_bytes)} if dtype in ITEM_BYTES:
            return Envelope(facts, dtype, _read(connection, num_bytes))  # type: ignore[arg-type]
    raise MessageError("a header of something else; expected facts, dtype and num_bytes")


def _require_own(connection: socket.socket) -> None:
    """Refuse another user's process, where the system says whose it is; the folder keeps it away everywhere.

    Raises:
        MessageError: it is another user's.
    """
    if sys.platform == "linux":
        format_ = "3i"
        given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(format_))
        _, user, _ = struct.unpack(format_, given)
        if user != os.getuid():
            raise MessageError(f"a process of user {user}; expected one of user {os.getuid()}")


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    try:
        content = bytearray(num_bytes)
    except (MemoryError, OverflowError, ValueError):
        raise MessageError(f"a message of {num_bytes} bytes") from None
    view, start = memoryview(content), 0
    while start < num_bytes:
        received = connection.recv_into(view[start:])
        if received == 0:
            raise EOFError("the connection ended")
        start += received
    return bytes(content)


def _socket_path(settings: str) -> Path:
    """Where the trainer of these settings listens: a folder of this user's, with a name short enough for a socket.

    Raises:
        ConfigError: somebody else owns the folder or can write into it.
    """
    name = Path(f"sfedlora-trainers-{os.getuid()}", f"{hashlib.sha256(settings.encode()).hexdigest()[:24]}.sock")
    path = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        path = Path("/tmp") / name  # noqa: S108 - the folder in it is checked below
    folder = path.parent
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); set TMPDIR to a folder that can") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} is not a folder that only this user can use; remove it, or set TMPDIR")
    return path


if __name__ == "__main__":
    main()
