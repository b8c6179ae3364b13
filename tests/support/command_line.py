"""Runs the command line as a user would: in this process (fast), or as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from sfedlora.cli import main

__all__ = ["TINY", "Outcome", "command", "sfedlora", "start", "write_config"]

TINY: Mapping[str, object] = {
    "preset": "sfed-lora",
    "model": {"source": "package:sfedlora/assets/tiny_llama"},
    "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "max_length": 48},
    "partition": {"scheme": "column", "column": "topic", "num_clients": 3},
    "lora": {"rank": 4, "alpha": 8},
    "rounds": {"num_rounds": 2},
    "local": {"learning_rate": 1e-2, "local_steps": 2, "batch_size": 4},
    "threads": 1,
}
"""Three chat clients on the committed tiny model: two rounds in well under a second."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str


def sfedlora(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """Run one command in this process. Warnings are shown as to a user, not raised; exceptions are not hidden."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    code = stopped.value.code
    return Outcome(code if isinstance(code, int) else 0, shown.out, shown.err)


def command(*arguments: str | Path) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", "from sfedlora.cli import main; main()", *map(str, arguments)]


def start(*arguments: str | Path, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start a command as a process of its own; `communicate` ends it."""
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=stderr, text=True)


def write_config(path: Path, **sections: object) -> Path:
    """A run.yaml of `TINY` with some sections or keys merged in."""
    content = dict(TINY)
    for name, section in sections.items():
        before = content.get(name)
        if isinstance(before, Mapping) and isinstance(section, Mapping):
            content[name] = {**before, **section}
        else:
            content[name] = section
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
