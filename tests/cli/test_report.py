"""`sfedlora report` on a real run, on one without rounds, and where the extra is missing."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from support.command_line import command, sfedlora, write_config
from support.html_pages import read_page
from support.run_files import write_run

Capture = pytest.CaptureFixture[str]


def test_a_real_run_has_a_page_with_its_clients_and_answers(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path / "run.yaml", output=str(tmp_path / "run"))
    assert sfedlora(capsys, "run", config).code == 0
    outcome = sfedlora(capsys, "report", tmp_path / "run", "--samples", "2")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert [Path(line.removeprefix("figure: ")).name for line in lines[1:]] == ["metrics.png", "gradients.png"]
    page = read_page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    answers = next(table for table in page.tables if "before" in table[0])
    assert len(answers) == 3
    assert all(cell for row in answers[1:] for cell in row[:3])
    clients = next(table for table in page.tables if "loss change" in table[0])
    column = clients[0].index("loss change")
    assert all(float(row[column]) < 0 for row in clients[1:]), "two rounds lower every client's loss here"


def test_a_run_without_rounds_has_a_page_and_no_figures(tmp_path: Path, capsys: Capture) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    (run / "metrics.jsonl").unlink()
    outcome = sfedlora(capsys, "report", run)
    assert (outcome.code, outcome.out) == (0, f"report: {run / 'report.html'}\n")


def test_bad_arguments_give_one_message(tmp_path: Path, capsys: Capture) -> None:
    for arguments in (["--watch", "a", "b"], ["--watch", "a", "--samples", "1"], [str(tmp_path)]):
        outcome = sfedlora(capsys, "report", *arguments)
        assert outcome.code == 2
        assert outcome.err.startswith("error: ")
        assert len(outcome.err.splitlines()) == 1


def test_without_the_extra_one_message_says_what_to_install(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=3.5)
    hidden = "import sys; sys.modules['plotly'] = None; from sfedlora.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "report", str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: the report needs plotly; install it with: pip install 'sfedlora[report]'\n"


def test_watching_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    process = subprocess.Popen(command("report", "--watch", run), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().split(": ", 1)[1].split()[0]
    with urllib.request.urlopen(address, timeout=20) as answer:  # noqa: S310 - on this machine
        assert b"not finished: 1 rounds" in answer.read()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0
