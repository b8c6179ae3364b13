"""`sfedlora init` from flags, by asking, and where it must refuse; groups of the help."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from sfedlora import RunConfig
from support.command_line import command, sfedlora

Capture = pytest.CaptureFixture[str]


def test_flags_alone_make_a_file_that_runs(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.yaml"
    outcome = sfedlora(capsys, "init", path, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert f"sfedlora run {path}" in outcome.out
    assert RunConfig.load(path).partition.column == "topic"
    short = ["rounds.num_rounds=1", "local.local_steps=1", "threads=1"]
    assert sfedlora(capsys, "run", path, *short).code == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_classification_by_number_of_clients(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.yaml"
    flags = ["--model", "m", "--data", "d.csv", "--task", "sequence-classification", "--clients", "5", "--rank", "16"]
    assert sfedlora(capsys, "init", path, *flags).code == 0
    config = RunConfig.load(path)
    assert (config.model.source, config.model.task, config.data.source) == ("m", "sequence-classification", "d.csv")
    assert (config.partition.scheme, config.partition.num_clients, config.lora.rank) == ("iid", 5, 16)


def test_a_file_that_is_there_is_kept(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine", encoding="utf-8")
    outcome = sfedlora(capsys, "init", path)
    assert (outcome.code, path.read_text(encoding="utf-8")) == (2, "mine")
    assert "already exists" in outcome.err
    assert sfedlora(capsys, "init", path, "--force").code == 0
    assert sfedlora(capsys, "init", tmp_path / "b.yaml", "--clients", "3", "--column", "topic").code == 2


def test_on_a_terminal_it_asks(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    path = tmp_path / "run.yaml"
    process = subprocess.Popen(command("init", path), stdin=follower, stdout=subprocess.PIPE, text=True)
    os.write(leader, b"some/model\nrows.jsonl\ncausal-lm\n7\n")
    out, _ = process.communicate(timeout=60)
    os.close(follower)
    os.close(leader)
    assert process.returncode == 0
    assert "Base model" in out
    assert RunConfig.load(path).partition.num_clients == 7


def test_verbs_are_grouped_by_what_one_wants(capsys: Capture) -> None:
    out = sfedlora(capsys, "--help").out
    groups = ["Begin", "Run", "Look at what came out", "Use it"]
    places = [out.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)
    assert places[0] < out.index(" probe ") < places[1] < out.index(" compare ") < places[2] < out.index(" evaluate ")
    assert "--install-completion" in out
