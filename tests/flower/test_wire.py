"""What lies between a node and the link: somebody who changes or repeats messages, and the proxy of the written app."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flower.deployment import Deployment, free_port
from flower.federations import chat_config, chat_files
from flower.wire import flipped, relay, repeated, unchanged

JOINED = "SuperNode ID"
"""What a node prints once the link has taken it."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A link that knows two nodes."""
    folder = tmp_path_factory.mktemp("wire")
    with Deployment.write(folder / "federation", chat_config(folder), num_nodes=2) as started:
        started.start_link()
        for number in range(2):
            started.register(number)
        yield started


@pytest.fixture
def node(deployment: Deployment, tmp_path: Path) -> dict[str, str]:
    return {"client-id": "ai", "data": str(chat_files(tmp_path)["ai"]), "state-dir": str(deployment.root / "state")}


def _has_joined(
    deployment: Deployment, name: str, *, seconds: float, until: Callable[[], bool] = lambda: False
) -> bool:
    """Whether a node has joined in that time, or by the moment that `until` holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and JOINED not in deployment.log(name):
        if until():
            return False
        time.sleep(0.2)
    return JOINED in deployment.log(name)


@pytest.mark.parametrize(
    ("number", "change"),
    [pytest.param(0, flipped, id="changed"), pytest.param(1, repeated, id="repeated", marks=pytest.mark.slow)],
)
def test_a_message_that_is_changed_or_repeated_on_its_way_is_not_taken(
    number: int, change: Callable[[bytes], bytes], deployment: Deployment, node: dict[str, str]
) -> None:
    with relay(deployment.port, change, first_record=1) as between:
        name = deployment.start_node(number, node, port=between.port)
        joined = _has_joined(deployment, name, seconds=60.0, until=lambda: between.num_changed >= 3)
        deployment.stop(name)
        assert between.num_changed >= 1, deployment.log(name)
        assert not joined, deployment.log(name)
    # the same node with the same key through a relay that changes nothing
    with relay(deployment.port, unchanged, first_record=1) as between:
        name = deployment.start_node(number, node, port=between.port)
        assert _has_joined(deployment, name, seconds=90.0), deployment.log(name)
        deployment.stop(name)
        assert between.num_changed >= 1


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_the_proxy_of_the_written_app_publishes_the_fleet_path_only(
    deployment: Deployment, node: dict[str, str], tmp_path: Path
) -> None:
    told = re.search(r"`(ssh-keygen [^`]+)`", (deployment.root / "README.md").read_text())  # how a site makes its key
    assert told is not None
    subprocess.run(shlex.split(told[1]), cwd=tmp_path, check=True, capture_output=True)
    registered = deployment.flwr("supernode", "register", str(tmp_path / "node.key.pub"), "loopback", "--name", "new")
    assert registered.returncode == 0, registered.stdout + registered.stderr
    port = _start_nginx(deployment)
    name = deployment.start_node(2, node, port=port, key=tmp_path / "node.key")
    assert _has_joined(deployment, name, seconds=90.0), deployment.log(name)
    settings = deployment.root / "home" / "config.toml"
    direct = settings.read_text()
    assert deployment.flwr("list", "loopback").returncode == 0
    settings.write_text(direct.replace(f"127.0.0.1:{deployment.port}", f"127.0.0.1:{port}"))
    refused = deployment.flwr("list", "loopback")
    settings.write_text(direct)
    assert refused.returncode != 0 or "403" in refused.stdout + refused.stderr, refused.stdout + refused.stderr


def _start_nginx(deployment: Deployment) -> int:
    """Nginx with the app's `deploy/proxy.conf` on ports and certificates of this machine; its port."""
    port, certificates = free_port(), deployment.root / "certificates"
    site = (deployment.root / "deploy" / "proxy.conf").read_text()
    site = re.sub(r"listen 443\b", f"listen 127.0.0.1:{port}", site)
    site = site.replace("/etc/sfedlora/", f"{certificates}/").replace("127.0.0.1:8443", f"127.0.0.1:{deployment.port}")
    folder = deployment.root / "nginx"
    folder.mkdir()
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log {folder}/access.log;\n{temporary}{site}\n}}\n"
    )
    nginx = shutil.which("nginx")
    assert nginx is not None
    checked = subprocess.run(
        [nginx, "-t", "-c", str(folder / "nginx.conf")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    deployment.start_process("nginx", [nginx, "-c", str(folder / "nginx.conf")])
    return port
