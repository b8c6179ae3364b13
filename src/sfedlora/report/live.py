"""The report of a run that goes on, served to this machine alone and made anew for every look at it.

The server listens on 127.0.0.1, answers GET for three paths (the page, plotly.js, a version that changes when a file of
the run changes), and nothing else: no file of the run can be fetched. Requests under another host name are refused, so
that a web page elsewhere cannot read the report through a name that it resolves to this machine.
"""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sfedlora.errors import InputError, SfedLoraError
from sfedlora.report.blocks import Note, Section
from sfedlora.report.page import Page, plotly_source, render
from sfedlora.report.write import page_of

__all__ = ["make_server", "server_address"]

HOST = "127.0.0.1"
WATCHED = ("metrics.jsonl", "summary.json", "results.jsonl", "config.yaml", "*/metrics.jsonl", "*/summary.json")


def make_server(directory: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server that is bound and waits for `serve_forever`.

    Args:
        directory: a run directory or a comparison's folder.
        port: 0 takes one that is free.

    Raises:
        InputError: the directory is neither, plotly is missing, or the port cannot be had.
    """
    page_of(directory)
    plotly = plotly_source()

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "sfedlora", ""

        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this report is for this machine alone")
            elif self.path == "/":
                self._answer(HTTPStatus.OK, "text/html", render(_page(directory), plotly=plotly, live=True))
            elif self.path == "/plotly.js":
                self._answer(HTTPStatus.OK, "text/javascript", plotly, cache="max-age=86400")
            elif self.path == "/version":
                self._answer(HTTPStatus.OK, "text/plain", _version(directory))
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "not here")

        def _answer(self, status: HTTPStatus, kind: str, text: str, *, cache: str = "no-store") -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", cache)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Requests are not logged."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--port {port}: cannot be used ({error}); choose another, or 0 for one that is free"
        ) from None


def server_address(server: ThreadingHTTPServer) -> str:
    """What to open in a browser."""
    return f"http://{HOST}:{server.server_address[1]}/"


def _page(directory: Path) -> Page:
    try:
        return page_of(directory)
    except SfedLoraError as error:  # a file that is damaged, or gone since
        return Page(directory.resolve().name, "cannot be read at present", [], [Section("Error", [Note(str(error))])])


def _version(directory: Path) -> str:
    seen = []
    for path in sorted(path for pattern in WATCHED for path in directory.glob(pattern)):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        seen.append((str(path), status.st_mtime_ns, status.st_size))
    return hashlib.sha256(repr(seen).encode()).hexdigest()
