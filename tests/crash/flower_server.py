"""The server of a federation across sites, killed at every operation on its run directory.

Its sites are real ones in the same process, so they end and start again with it; what they keep is on their own disks,
on which nothing is killed here (`flower_node`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from crash.deployment import SITES, Deployment, files_below, serve_here, server_files

__all__ = ["Server"]


@dataclass(frozen=True)
class Server:
    """A server with two sites.

    Attributes:
        deployment: the federation.
    """

    deployment: Deployment

    def prepare(self, shared: Path) -> None:
        self.deployment.prepare(shared)

    def watched(self, folder: Path) -> Path:
        return folder / "server"

    def is_finished(self, folder: Path) -> bool:
        return (folder / "server" / "summary.json").is_file()

    def start(self, shared: Path, folder: Path, boundary: Callable[[], None]) -> None:
        nodes = {
            number: self.deployment.site(shared, client_id, folder / "sites" / client_id)
            for number, client_id in enumerate(SITES, start=1)
        }
        serve_here(self.deployment.config(shared, folder / "server"), nodes, boundary)

    def result(self, folder: Path) -> Mapping[str, bytes]:
        """The server's files, and all that the sites keep: B, moments and heads of the kept rounds, their adapters."""
        sites = files_below(folder / "sites")
        return {**server_files(folder / "server"), **{f"sites/{name}": one for name, one in sites.items()}}
