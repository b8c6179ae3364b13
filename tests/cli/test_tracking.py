"""Trackers: TensorBoard's own reader finds what metrics.jsonl says; wrong and missing ones give one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfedlora.cli.tracking import scalars
from support.command_line import sfedlora, write_config

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_tensorboard_has_every_round(tmp_path: Path) -> None:
    """In a process of its own: tensorboard's imports warn about themselves."""
    config = write_config(tmp_path / "run.yaml", output=str(tmp_path / "run"))
    script = (
        "import sys; from sfedlora.cli import main\n"
        "try: main(['run', sys.argv[1], '--track', 'tensorboard'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "read = EventAccumulator(sys.argv[2]); read.Reload()\n"
        "import json; print('TAGS', json.dumps({t: [[e.step, e.value] for e in read.Scalars(t)]"
        " for t in read.Tags()['scalars']}))\n"
    )
    where = tmp_path / "run" / "tracking" / "tensorboard"
    done = subprocess.run(
        [sys.executable, "-c", script, str(config), str(where)], capture_output=True, text=True, check=True
    )
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("TAGS ")).removeprefix("TAGS ")
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for key in ("eval_loss", "perplexity", "grad_norm_b", "gain", "bytes_up"):
        assert found[key] == [[record["round_num"], pytest.approx(record[key])] for record in records]
    settings = next(where.rglob("hparams.yml")).read_text(encoding="utf-8")
    assert "lora.scaling: sfed" in settings


def test_trackers_that_cannot_be_used_are_named_before_anything_runs(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path / "run.yaml", output=str(tmp_path / "run"))
    outcome = sfedlora(capsys, "run", config, "--track", "paper")
    assert outcome.code == 2
    assert outcome.err == ("error: --track paper: unknown tracker; choose from tensorboard, wandb, mlflow, trackio\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_gives_one_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfedlora.cli.tracking import Trackers
    from sfedlora.errors import ConfigError

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"--track {name}: not installed; pip install 'sfedlora\[trackers\]'"):
        Trackers([name])


def test_scalars_are_the_finite_numbers() -> None:
    record = {"round_num": 3, "schema_version": 1, "eval_loss": 2.0, "gain": None, "perplexity": float("inf")}
    assert scalars({**record, "clients": {"a": {"eval_loss": 1.0}}, "scaling": {"a": 1.0}}) == {"eval_loss": 2.0}
