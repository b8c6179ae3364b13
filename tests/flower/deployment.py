"""A link and nodes as processes of their own on loopback, with TLS and node keys: what `flower init`'s README does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from sfedlora import RunConfig
from sfedlora.flower.app_files import write_app
from sfedlora.flower.certificates import write_test_certificates
from sfedlora.flower.launch import QUIET

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Deployment:
    """A federation on loopback; ends every process that it has started, trainers too.

    Attributes:
        root: the folder that `flower init` wrote.
        port: of the link.
        processes: name -> process.
    """

    root: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @classmethod
    def write(cls, folder: Path, config: RunConfig, *, num_nodes: int) -> Deployment:
        """The app, certificates and keys."""
        write_app(folder, config)
        write_test_certificates(folder / "certificates", num_nodes=num_nodes)
        deployment = cls(folder)
        settings = folder / "home" / "config.toml"
        settings.write_text(settings.read_text().replace("127.0.0.1:8443", f"127.0.0.1:{deployment.port}"))
        return deployment

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in reversed(list(self.processes)):
            self.stop(name)
        for log in self.root.glob("state*/trainer.log"):
            for pid in re.findall(r"process (\d+)", log.read_text()):
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **QUIET, "FLWR_HOME": str(self.root / "home"), "PATH": path}

    def start_link(self, *, wait_seconds: float = 90.0) -> None:
        """The link, with TLS and node keys."""
        certificates = self.root / "certificates"
        self.start_process(
            "link",
            [
                *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--ssl-ca-certfile", str(certificates / "ca.crt")),
                *("--ssl-certfile", str(certificates / "server.crt")),
                *("--ssl-keyfile", str(certificates / "server.key")),
                *("--enable-supernode-auth", "--database", str(self.root / "link.db")),
                "--disable-runtime-dependency-installation",
            ],
        )
        end = time.monotonic() + wait_seconds
        while not self._is_listening():
            if time.monotonic() > end or self.processes["link"].poll() is not None:
                raise RuntimeError(self.log("link"))
            time.sleep(0.2)

    def register(self, number: int) -> subprocess.CompletedProcess[str]:
        """Make a node's key known to the link."""
        key = self.root / "certificates" / f"node{number}.pub"
        return self.flwr("supernode", "register", str(key), "loopback", "--name", f"site{number}")

    def start_node(
        self,
        number: int,
        node: Mapping[str, str],
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        secure: bool = True,
        port: int | None = None,
    ) -> str:
        """A node, with certificate authority and key or with neither; returns the name of its process.

        `port` is where it finds the link, if something stands between them.
        """
        name = f"node{number}"
        certificates = self.root / "certificates"
        self.ports.setdefault(name, free_port())
        settings = " ".join(f'{key_}="{value}"' for key_, value in node.items())
        credentials = [
            *("--root-certificates", str(certificate or certificates / "ca.crt")),
            *("--auth-supernode-private-key", str(key or certificates / f"node{number}.key")),
        ]
        self.start_process(
            name,
            [
                *("flower-supernode", "--superlink", f"localhost:{port or self.port}", "--port", str(self.ports[name])),
                *(credentials if secure else ["--insecure"]),
                *("--node-config", settings),
            ],
        )
        return name

    def flwr(self, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """One call of flwr."""
        return subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, **settings: str) -> str:
        """Start a run and return its id; the link goes on with it by itself."""
        given = [f"{key}={value}" for key, value in settings.items()]
        options = ["-c", " ".join(given)] if given else []
        done = self.flwr("run", "app", "loopback", "--format", "json", *options)
        found = re.search(r'"run-id":\s*"?(\d+)', done.stdout)
        if found is None:
            raise RuntimeError(done.stdout + done.stderr)
        return found[1]

    def status(self, run_id: str) -> str:
        """The status of a run in Flower's words, `finished:completed` at best."""
        done = self.flwr("list", "loopback", "--run-id", run_id, "--format", "json")
        with suppress(ValueError, KeyError, IndexError, TypeError):
            return str(json.loads(done.stdout)["runs"][0]["status"])
        return done.stdout + done.stderr

    def wait_for_file(self, path: str, *, seconds: float) -> None:
        """Wait until a file or folder of the run directory is there."""
        end = time.monotonic() + seconds
        while not (self.root / "run" / path).exists():
            if time.monotonic() > end:
                logs = "\n".join(f"== {name}\n{self.log(name)[-2000:]}" for name in self.processes)
                raise TimeoutError(f"{path} is not there after {seconds:g} s\n{logs}")
            time.sleep(0.2)

    def wait_for_end(self, run_id: str, *, seconds: float) -> str:
        """Wait for the end of a run; its status."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.status(run_id)
            if status.startswith("finished"):
                return status
            time.sleep(2.0)  # each look is a process of its own
        return f"not finished after {seconds:g} s: {self.status(run_id)}"

    def kill_server_app(self) -> None:
        """Kill the process that runs the rounds; the link goes on."""
        link = psutil.Process(self.processes["link"].pid)
        found = [child for child in link.children(recursive=True) if "serverapp" in " ".join(child.cmdline())]
        assert found, "no server app is running"
        for child in found:
            child.kill()

    def restart_node(self, number: int, node: Mapping[str, str], *, seconds: float) -> None:
        """Start a node again, as a supervisor does: until it is no longer refused because of its old lease."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name = self.start_node(number, node)
            try:
                self.processes[name].wait(20)
            except subprocess.TimeoutExpired:
                return
            time.sleep(5)
        raise TimeoutError(self.log(f"node{number}")[-3000:])

    def stop(self, name: str, *, kill: bool = False) -> None:
        """End a process and those that it has started."""
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if kill else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def log(self, name: str) -> str:
        """What a process has printed."""
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def start_process(self, name: str, command: list[str]) -> None:
        """Start a process that ends with the deployment; what it prints goes to `log`."""
        executable = shutil.which(command[0], path=str(BIN))
        assert executable is not None
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [executable, *command[1:]],
                cwd=self.root,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _is_listening(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
