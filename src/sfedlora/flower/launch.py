"""Submit a written app with `flwr`, follow it, and tell by an exit code how it ended.

`flwr run` ends with 0 whatever becomes of the run. Flower's own settings are those of the folder that `flower init`
wrote; it sends no statistics, looks for no updates and installs nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfedlora.errors import ConfigError, RunError

__all__ = ["QUIET", "launch"]

QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def launch(folder: Path, link: str, overrides: Sequence[str], *, resume: bool) -> None:
    """Run the app of a folder on a link and show its log until it ends.

    Args:
        folder: what `flower init` wrote.
        link: a name in the folder's `home/config.toml`: simulation, loopback, sites.
        overrides: `key=value` settings of run.yaml.
        resume: go on after the last complete round.

    Raises:
        ConfigError: no such app, or Flower refuses it.
        RunError: the run failed.
    """
    if not (folder / "app" / "run.yaml").is_file():
        raise ConfigError(f"{folder}: no app (app/run.yaml is missing); write one with `sfedlora flower init`")
    if any(character in text for text in overrides for character in "\"'\\"):
        raise ConfigError("settings on the command line cannot hold quotes or backslashes here; write them to run.yaml")
    given = [f'overrides="{" ".join(overrides)}"'] if overrides else []
    given += ["resume=true"] if resume else []
    options = ["--run-config", " ".join(given)] if given else []
    submitted = _flwr(folder, "run", "app", link, "--format", "json", *options)
    found = re.search(r'"run-id":\s*"?(\d+)', submitted)
    if found is None:
        raise ConfigError(f"Flower did not take the app: {_last_lines(submitted)}")
    _follow(folder, found[1], link)
    status = _status(_flwr(folder, "list", link, "--run-id", found[1], "--format", "json"))
    if status != "finished:completed":
        raise RunError(f"Flower's run {found[1]} ended as {status}; go on with --resume once the cause is mended")


def _environment(folder: Path) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)  # Flower starts its own programs by name
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "FLWR_HOME": str((folder / "home").absolute()), "PATH": path}


def _flwr(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "flwr.cli.app", *arguments]
    done = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _follow(folder: Path, run_id: str, link: str) -> None:
    """Show a run's log until it ends."""
    command = [sys.executable, "-m", "flwr.cli.app", "log", run_id, link, "--stream"]
    subprocess.run(command, cwd=folder, env=_environment(folder), check=False)


def _status(listed: str) -> str:
    """The status in what `flwr list` prints."""
    start = listed.find("{")
    try:
        runs = json.JSONDecoder().raw_decode(listed[start:])[0]["runs"]
        return str(runs[0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return f"unknown ({_last_lines(listed)})"


def _last_lines(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " / ".join(line.strip() for line in plain.splitlines()[-4:] if line.strip()) or "nothing was printed"
