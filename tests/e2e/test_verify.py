"""`sfedlora verify` finds a run equal to itself, and one flipped bit or digit in it."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from sfedlora import RunConfig, RunResult, run
from support.command_line import sfedlora, write_config

Capsys = pytest.CaptureFixture[str]
FORMAT_1 = Path(__file__).parents[1] / "artifacts" / "format_1" / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(
        folder / "run.yaml",
        data={"max_length": 24},
        rounds={"num_rounds": 3, "cohort_size": 2},
        lora={"rank": 2, "dropout": 0.1},
        local={"optimizer_state": "keep"},
        output=str(folder / "run"),
    )
    return run(RunConfig.load(config))


@pytest.fixture
def run_dir(whole: RunResult, tmp_path: Path) -> Path:
    return shutil.copytree(whole.run_dir, tmp_path / "run")


def test_a_run_is_equal_to_itself_and_stays_as_it_is(run_dir: Path, capsys: Capsys) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for arguments in ([], ["--round", "3"]):
        outcome = sfedlora(capsys, "verify", run_dir, *arguments)
        assert outcome.code == 0, outcome.err + outcome.out
        assert outcome.out.startswith(f"round 3 of {run_dir}: equal bit for bit")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_workers_and_stacks_change_no_bit_and_earlier_runs_are_equal_too(tmp_path: Path, capsys: Capsys) -> None:
    """The copy of a run that an earlier version wrote, before there were checksums."""
    outcome = sfedlora(capsys, "verify", shutil.copytree(FORMAT_1, tmp_path / "run"))
    assert outcome.code == 0, outcome.err + outcome.out
    assert "round 2 of" in outcome.out


def _last_value(path: Path) -> tuple[float, float]:
    """Flip the lowest bit of the last float32 of a safetensors file; the value before and after."""
    content = bytearray(path.read_bytes())
    before = struct.unpack("<f", content[-4:])[0]
    content[-4] ^= 1
    path.write_bytes(content)
    return before, struct.unpack("<f", content[-4:])[0]


def _forge_checksum(path: Path) -> None:
    """Make the checksum of a changed file right again, as a forger would."""
    sums = path.parent / "checksums.sha256"
    lines = [line for line in sums.read_text(encoding="utf-8").splitlines() if not line.endswith(f"  {path.name}")]
    lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    sums.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_one_flipped_bit_of_the_server_is_found(run_dir: Path, capsys: Capsys) -> None:
    path = run_dir / "checkpoints" / "round-000003" / "server.safetensors"
    before, after = _last_value(path)
    outcome = sfedlora(capsys, "verify", run_dir)
    assert outcome.code == 3
    assert "server.safetensors: damaged: its content is not what was written" in outcome.err
    _forge_checksum(path)
    outcome = sfedlora(capsys, "verify", run_dir)
    assert outcome.code == 3, outcome.err
    place, expected, found = outcome.out.splitlines()
    assert "different: checkpoints/round-000003/server.safetensors, tensor shared/a:" in place
    assert float(expected.removeprefix("  expected ")) == before
    assert float(found.removeprefix("  found    ")) == after


def _edit_metrics(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def edit(run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        *lines, last = path.read_text(encoding="utf-8").splitlines()
        record = json.loads(last)
        change(record)
        path.write_text("\n".join([*lines, json.dumps(record)]) + "\n", encoding="utf-8")

    return edit


FORGED = {
    "a metric": (_edit_metrics(lambda line: line.update(train_loss=0.5)), "metrics.jsonl, train_loss"),
    "a client's metric": (
        _edit_metrics(lambda line: next(iter(line["clients"].values())).update(num_examples=1)),  # type: ignore[attr-defined]
        ".num_examples",
    ),
    "a key that no round writes": (_edit_metrics(lambda line: line.update(bonus=1)), "metrics.jsonl, bonus"),
    "an adapter": (
        lambda run_dir: _last_value(min((run_dir / "adapters" / "clients").glob("*/adapter_model.safetensors"))),
        "adapters/clients/",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_was_forged_is_named(name: str, run_dir: Path, capsys: Capsys) -> None:
    forge, where = FORGED[name]
    forge(run_dir)
    outcome = sfedlora(capsys, "verify", run_dir)
    assert outcome.code == 3, outcome.err
    assert where in outcome.out.splitlines()[0]


def test_a_round_that_cannot_be_recomputed_is_told(run_dir: Path, capsys: Capsys) -> None:
    for number in ("1", "9"):
        outcome = sfedlora(capsys, "verify", run_dir, "--round", number)
        assert outcome.code == 2
        assert f"round {number} cannot be recomputed" in outcome.err
        assert "possible is 3" in outcome.err
    shutil.rmtree(run_dir / "checkpoints" / "round-000002")
    outcome = sfedlora(capsys, "verify", run_dir)
    assert outcome.code == 2
    assert "possible is none" in outcome.err
