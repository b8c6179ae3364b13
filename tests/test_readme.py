"""Every code block of the README runs, or is listed here with the reason why it does not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.command_line import sfedlora

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "python3 -m venv .venv": "installation; the continuous integration does it with the same constraints",
    "make demo": "downloads a model and takes minutes",
    "sfedlora demo --quick": "runs in tests/test_demo.py",
    "pip install -c constraints.txt": "installs; tests/flower/test_simulation.py runs the rest",
    "make test": "is the command that runs this test",
    "@article": "a citation",
    "argv + run.yaml": "a diagram",
}
OUTPUT = "text"


def blocks() -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(README.read_text(encoding="utf-8"))]


def reason_not_to_run(content: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if content.startswith(start)), None)


def test_every_reason_belongs_to_a_block() -> None:
    for start in NOT_RUN:
        assert any(content.startswith(start) for _, content in blocks()), start


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"\b[A-Z]+_OUTPUT\b", README.read_text(encoding="utf-8"))


def test_the_blocks_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, content in blocks():
        if language == OUTPUT or reason_not_to_run(content) is not None:
            continue
        ran.append(language)
        if language == "yaml":
            (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
        elif language == "bash":
            for text in content.splitlines():
                program, *arguments = shlex.split(text)
                assert program == "sfedlora", text
                outcome = sfedlora(capsys, *arguments)
                assert outcome.code == 0, f"{text}\n{outcome.err}"
        else:
            assert language == "python", language
            exec(compile(content, str(README), "exec"), {})  # noqa: S102 - our own README
    assert ran == ["yaml", "bash", "python"]
    assert (tmp_path / "runs" / "grid" / "results.jsonl").read_text(encoding="utf-8").count("\n") == 6
    assert (tmp_path / "exported").is_dir()
