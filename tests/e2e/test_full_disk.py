"""A disk that fills up while a run writes: one message, exit 3, what was stored stays whole, resume goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfedlora import RunConfig, RunResult, run
from support.command_line import sfedlora, write_config
from support.full_disk import largest_file


@pytest.mark.parametrize("limit", [1500, 6000, 15_000])
def test_a_full_disk(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 1.5 kB the setup does not fit, at 6 kB the metrics or a checkpoint, at 15 kB the longer metrics file."""
    config = write_config(
        tmp_path / "run.yaml",
        rounds={"num_rounds": 20},
        local={"local_steps": 1},
        output=str(tmp_path / "run"),
    )
    whole = run(RunConfig.load(config, [f"output={tmp_path / 'whole'}"]))  # also fills the encoding cache
    with largest_file(limit):
        outcome = sfedlora(capsys, "run", config)
    assert outcome.code == 3, outcome.err
    assert outcome.err.splitlines()[-1].startswith("run failed: ")
    assert "free space" in outcome.err
    assert "Traceback" not in outcome.err
    run_dir = tmp_path / "run"
    if not run_dir.exists():
        assert limit == 1500, "nothing stays behind where the run could not begin"
        return
    assert (run_dir / "config.yaml").is_file()
    assert sfedlora(capsys, "resume", run_dir).code == 0
    for path in (whole.run_dir / "adapters").rglob("*.*"):
        assert (run_dir / path.relative_to(whole.run_dir)).read_bytes() == path.read_bytes()
    assert (run_dir / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 20


@pytest.mark.parametrize("limit", [2000, 30_000, 100_000])
def test_a_merged_model_that_does_not_fit_leaves_nothing(
    limit: int, finished: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    with largest_file(limit):
        outcome = sfedlora(capsys, "export", finished.run_dir, target, "--merged")
    assert outcome.code == 3, outcome.err
    assert outcome.err.splitlines()[-1].startswith("run failed: ")
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []
    assert sfedlora(capsys, "export", finished.run_dir, target, "--merged").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in target.iterdir()}
    assert not [path for path in target.iterdir() if path.name.startswith((".", "adapter"))]
