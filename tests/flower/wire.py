"""A relay between a node and the link that changes or repeats what the node sends, as somebody on the way could."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

HEADER_BYTES = 5
APPLICATION_DATA = 23
"""Content type of a TLS record after the handshake; what comes before it is handed on as it is."""


@dataclass
class Relay:
    """What a relay did.

    Attributes:
        port: where it listens, on loopback.
        num_changed: encrypted records that it did something to.
    """

    port: int = 0
    num_changed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self) -> None:
        with self.lock:
            self.num_changed += 1


def unchanged(record: bytes) -> bytes:
    """Hand a record on."""
    return record


def flipped(record: bytes) -> bytes:
    """Change one bit in the middle of a record."""
    middle = HEADER_BYTES + (len(record) - HEADER_BYTES) // 2
    return record[:middle] + bytes([record[middle] ^ 1]) + record[middle + 1 :]


def repeated(record: bytes) -> bytes:
    """Send a record twice."""
    return record + record


@contextmanager
def relay(target: int, change: Callable[[bytes], bytes], *, first_record: int) -> Iterator[Relay]:
    """Relay connections to a port of loopback.

    Args:
        target: the port.
        change: what is done to each encrypted record of the node.
        first_record: how many encrypted records of a connection are handed on before that; the first one ends TLS's own
            handshake.
    """
    relayed = Relay()
    closed = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relayed.port = listener.getsockname()[1]
        listener.settimeout(0.2)

        def accept() -> None:
            while not closed.is_set():
                with suppress(TimeoutError):
                    node, _ = listener.accept()
                    link = socket.create_connection(("127.0.0.1", target))
                    threading.Thread(target=_back, args=(link, node), daemon=True).start()
                    threading.Thread(
                        target=_forth, args=(node, link, change, first_record, relayed), daemon=True
                    ).start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield relayed
        finally:
            closed.set()
            accepting.join()


def _forth(
    node: socket.socket, link: socket.socket, change: Callable[[bytes], bytes], first_record: int, relayed: Relay
) -> None:
    seen = 0
    with suppress(OSError, EOFError), node, link:
        while True:
            header = _exactly(node, HEADER_BYTES)
            record = header + _exactly(node, int.from_bytes(header[3:], "big"))
            if header[0] == APPLICATION_DATA:
                seen += 1
                if seen > first_record:
                    relayed.count()
                    record = change(record)
            link.sendall(record)


def _back(link: socket.socket, node: socket.socket) -> None:
    with suppress(OSError), node, link:
        while content := link.recv(65536):
            node.sendall(content)


def _exactly(source: socket.socket, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes:
        more = source.recv(num_bytes - len(content))
        if not more:
            raise EOFError
        content += more
    return content
