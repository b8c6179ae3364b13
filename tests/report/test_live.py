"""The live page: three paths, this machine only, news when a round has finished."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from sfedlora.errors import InputError
from sfedlora.report.live import make_server, server_address
from support.html_pages import read_page
from support.run_files import write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)


@pytest.fixture
def server(run_dir: Path) -> Iterator[ThreadingHTTPServer]:
    served = make_server(run_dir)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def get(server: ThreadingHTTPServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_it_serves_the_page_its_library_and_nothing_else(server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, text = get(server, "/")
    assert status == 200
    page = read_page(text)
    assert [value for value in page.loads if not value.startswith("#")] == ["data:,", "plotly.js"]
    assert get(server, "/plotly.js")[0] == 200
    for path in ("/config.yaml", "/metrics.jsonl", "/../run/config.yaml", "/%2e%2e/", "/checkpoints/", "/?x"):
        assert get(server, path)[0] == 404, path


def test_another_host_name_is_refused(server: ThreadingHTTPServer) -> None:
    port = server.server_address[1]
    assert get(server, "/", f"localhost:{port}")[0] == 200
    for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}"):
        assert get(server, "/", host)[0] == 403


def test_a_new_round_is_news_and_is_on_the_page(server: ThreadingHTTPServer, run_dir: Path) -> None:
    before = get(server, "/version")[1]
    assert get(server, "/version")[1] == before
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"round_num": 2, "eval_loss": 2.5}) + "\n")
    assert get(server, "/version")[1] != before
    assert any(text.startswith("not finished: 2 rounds") for text in read_page(get(server, "/")[1]).texts)


def test_a_damaged_file_is_said_on_the_page(server: ThreadingHTTPServer, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("{broken\n{}\n", encoding="utf-8")
    status, text = get(server, "/")
    assert status == 200
    assert "not valid JSON" in " ".join(read_page(text).texts)


def test_what_cannot_be_served_is_refused(tmp_path: Path, run_dir: Path, server: ThreadingHTTPServer) -> None:
    with pytest.raises(InputError, match="no run directory"):
        make_server(tmp_path / "nothing")
    port = server.server_address[1]
    assert server_address(server) == f"http://127.0.0.1:{port}/"
    with pytest.raises(InputError, match=f"--port {port}: cannot be used"):
        make_server(run_dir, port)
