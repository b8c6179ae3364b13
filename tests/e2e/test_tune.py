"""`run --tune`: what it measures, what it records, that results depend on the record alone; `model.compile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sfedlora import RunConfig, run
from sfedlora.errors import ConfigError
from sfedlora.federation.client import TrainingSetup, train_clients
from sfedlora.federation.runners import batched
from sfedlora.setup import tune as tune_module
from sfedlora.setup.resolve import require_compiler
from sfedlora.setup.tune import Measured, candidates, choose, tune
from support.command_line import sfedlora, write_config

Capsys = pytest.CaptureFixture[str]


def _chat(folder: Path, **sections: object) -> Path:
    return write_config(
        folder / "run.yaml",
        rounds={"num_rounds": 2, "cohort_size": 5},
        partition={"num_clients": 6},
        output=str(folder / "run"),
        **sections,
    )


def _adapters(run_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in (run_dir / "adapters").rglob("*.safetensors")}


def test_what_is_measured() -> None:
    assert candidates(1) == [1]
    assert candidates(5) == [1, 2, 4, 5]
    assert candidates(10_000) == [1, 2, 4, 8, 16, 32, 64]


def test_the_fewest_clients_that_are_about_as_fast() -> None:
    assert choose([Measured(1, 10.0), Measured(2, 5.1), Measured(4, 5.0), Measured(8, None)]) == 2
    assert choose([Measured(1, 10.0), Measured(2, 5.2), Measured(4, 5.0)]) == 4
    assert choose([Measured(1, 1.0), Measured(2, None)]) == 1


def test_tune_prints_records_and_changes_no_result(tmp_path: Path, capsys: Capsys) -> None:
    config = _chat(tmp_path)
    outcome = sfedlora(capsys, "run", "--tune", config)
    assert outcome.code == 0, outcome.err
    assert [f"clients_per_batch {number}: " in outcome.err for number in (1, 2, 4, 5)] == [True] * 4
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    chosen = recorded["clients_per_batch"]
    assert chosen in (1, 2, 4, 5)
    assert recorded["runner"] == ("serial" if chosen == 1 else "batched")
    assert f"taken: runner {recorded['runner']}, clients_per_batch {chosen}" in outcome.err
    given = [f"runner={recorded['runner']}", f"clients_per_batch={chosen}", f"output={tmp_path / 'given'}"]
    run(RunConfig.load(config, given))
    assert _adapters(tmp_path / "run") == _adapters(tmp_path / "given")


def test_what_is_measured_to_be_faster_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On clocks that stand still except for one number of clients."""

    def clock(runner: Any, works: Any) -> float:
        list(works)
        return 1.0 if runner.clients_per_batch == 4 else 2.0

    monkeypatch.setattr(tune_module, "_seconds_per_token", clock)
    before = torch.get_num_threads()
    tuned = tune(RunConfig.load(_chat(tmp_path)))
    assert (tuned.config.runner, tuned.config.clients_per_batch) == ("batched", 4)
    assert torch.get_num_threads() == before
    assert not (tmp_path / "run").exists()


def test_a_number_that_memory_does_not_hold_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def of_little_memory(setup: TrainingSetup, works: Any) -> Any:
        if len(works) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return train_clients(setup, works)

    monkeypatch.setattr(batched, "train_clients", of_little_memory)
    tuned = tune(RunConfig.load(_chat(tmp_path)))
    assert [item.clients_per_batch for item in tuned.measured if item.seconds_per_token is None] == [4, 5]
    assert tuned.config.clients_per_batch in (1, 2)


@pytest.mark.parametrize("given", [["runner=serial"], ["clients_per_batch=2"]])
def test_tune_beside_a_given_number_is_refused(given: list[str], tmp_path: Path, capsys: Capsys) -> None:
    outcome = sfedlora(capsys, "run", "--tune", _chat(tmp_path), *given)
    assert outcome.code == 2
    assert "--tune chooses runner and clients_per_batch" in outcome.err
    assert not (tmp_path / "run").exists()


def test_tune_looks_at_the_output_first(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("here", encoding="utf-8")
    outcome = sfedlora(capsys, "run", "--tune", _chat(tmp_path))
    assert outcome.code == 2
    assert "clients_per_batch" not in outcome.err


def test_one_participant_leaves_nothing_to_measure(tmp_path: Path) -> None:
    pooled = ["method.name=centralized", "lora.scaling=rslora", "lora.init=shared"]
    tuned = tune(RunConfig.load(_chat(tmp_path), pooled))
    assert tuned.config.runner == "serial"
    assert [item.clients_per_batch for item in tuned.measured] == [1]


def test_no_compiler_is_one_message(tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = sfedlora(capsys, "run", _chat(tmp_path), "model.compile=true")
    assert outcome.code == 2
    assert "no-such-compiler is not there" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    with pytest.raises(ConfigError, match=r"model\.compile: false"):
        require_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler about itself
@pytest.mark.parametrize("given", [["runner=serial"], ["runner=batched", "clients_per_batch=3"]])
def test_compiled_layers_give_the_same_results_up_to_rounding(given: list[str], tmp_path: Path) -> None:
    """A compiler was found to be there; 2 rounds of 2 AdamW steps: losses to 1e-5, adapters to 1e-3 relative.

    AdamW divides a gradient by its size, so a factor whose gradient is nearly zero shows the rounding of the whole.
    """
    require_compiler(torch.device("cpu"))
    results = {
        compiled: run(
            RunConfig.load(_chat(tmp_path), [*given, f"model.compile={compiled}", f"output={tmp_path / compiled}"])
        )
        for compiled in ("false", "true")
    }
    losses = [[record["eval_loss"] for record in result.metrics] for result in results.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [record["excluded"] for record in results["true"].metrics] == [{}, {}]
    plain, compiled = (
        {name: load_file(tmp_path / kind / name) for name in _adapters(tmp_path / kind)} for kind in ("false", "true")
    )
    assert plain.keys() == compiled.keys()
    differences = []
    for name, tensors in plain.items():
        for key, tensor in tensors.items():
            size = max(float(tensor.norm()), 1e-9)  # the shared adapter's B is zero
            differences.append(float((compiled[name][key] - tensor).norm()) / size)
    assert max(differences) < 1e-3
    assert max(differences) > 0, "nothing was compiled"
    assert json.loads((tmp_path / "true" / "summary.json").read_text(encoding="utf-8"))["last"]["round_num"] == 2
