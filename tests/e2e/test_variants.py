"""Every method, initialisation, task and option runs through the command line and does what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from sfedlora import RunConfig, RunResult, run
from sfedlora.experiment import load_state
from sfedlora.federation.state import serving_adapter
from support.command_line import sfedlora, write_config
from support.tiny_models import save_tiny_checkpoint, tiny_bert_classifier

Capsys = pytest.CaptureFixture[str]
METHODS = ["fedsa", "fedit", "ffa", "local", "centralized"]
PERSONAL = {"fedsa": "B", "fedit": "", "ffa": "", "local": "AB", "centralized": ""}


def _run(config: Path, *overrides: str) -> RunResult:
    return run(RunConfig.load(config, overrides))


def _adapters(result: RunResult) -> dict[str, dict[str, torch.Tensor]]:
    folder = result.run_dir / "adapters" / "clients"
    return {path.name: load_file(path / "adapter_model.safetensors") for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_keeps_apart_what_is_personal(name: str, tiny_config: Path) -> None:
    init = ["lora.init=shared"] if name == "centralized" else []
    result = _run(tiny_config, f"method.name={name}", "lora.scaling=rslora", *init)
    losses = [result.summary[when]["validation"]["weighted"]["eval_loss"] for when in ("initial", "last")]
    assert losses[1] < losses[0]
    adapters = list(_adapters(result).values())
    if name == "centralized":
        assert result.metrics[0]["cohort"] == ["centralized"]
        return
    assert len(adapters) == 3
    for part, letter in (("lora_A", "A"), ("lora_B", "B")):
        same = all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0] if part in key)
        assert same is (letter not in PERSONAL[name])
    if name == "ffa":
        assert all(record["grad_norm_a"] is None for record in result.metrics)
    if name == "local":
        assert result.metrics[0]["bytes_up"] == 0


@pytest.mark.parametrize("init", ["independent", "local", "shared", "reinit"])
def test_every_initialisation_has_its_count_and_gamma(
    init: str, tiny_config: Path, tmp_path: Path, capsys: Capsys
) -> None:
    outcome = sfedlora(capsys, "run", tiny_config, f"lora.init={init}", "rounds.weighting=uniform")
    assert outcome.code == 0, outcome.err
    count = 3.0 if init in ("independent", "local") else 1.0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert record["effective_clients"] == pytest.approx(count)
    assert record["scaling"] == pytest.approx(8 * math.sqrt(count / 4))
    assert ("warning: " in outcome.err) is (count == 1.0)
    if count == 1.0:
        assert "equals rslora" in outcome.err
        assert outcome.err.count("warning: ") == 1


def test_sfed_on_a_shared_draw_with_all_clients_counted_warns(tiny_config: Path, capsys: Capsys) -> None:
    outcome = sfedlora(capsys, "run", tiny_config, "lora.init=shared", "lora.num_clients=total")
    assert outcome.code == 0, outcome.err
    assert "warning: " in outcome.err
    assert "sqrt(3) times too large" in outcome.err
    assert "lora.init: independent" in outcome.err


def test_the_same_configuration_gives_the_same_bits_and_another_seed_others(tiny_config: Path, tmp_path: Path) -> None:
    first, second, other = (
        _run(tiny_config, f"output={tmp_path / str(number)}", f"seed={seed}") for number, seed in enumerate((3, 3, 4))
    )
    assert first.summary == second.summary
    for client, tensors in _adapters(first).items():
        assert all(torch.equal(tensor, _adapters(second)[client][name]) for name, tensor in tensors.items())
    assert first.summary != other.summary


def test_threads_are_set_and_recorded(tiny_config: Path) -> None:
    before = torch.get_num_threads()
    result = _run(tiny_config, "threads=2")
    assert torch.get_num_threads() == before
    environment = json.loads((result.run_dir / "environment.json").read_text(encoding="utf-8"))
    assert environment["threads"] == 2
    assert RunConfig.load(result.run_dir / "config.yaml").threads == 2


def test_threads_not_given_are_recorded_as_found(tiny_config: Path) -> None:
    torch.set_num_threads(1)
    result = _run(tiny_config, "threads=null")
    assert RunConfig.load(result.run_dir / "config.yaml").threads == 1


def test_a_file_for_validation_is_evaluated_beside_the_clients_own(tiny_config: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "What is AI?", "response": "A field of science."}] * 4
    (tmp_path / "extra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = _run(tiny_config, f"data.validation={tmp_path / 'extra.jsonl'}", f"data.test={tmp_path / 'extra.jsonl'}")
    last = result.summary["last"]
    assert last["validation"]["external_validation"]["eval_loss"] > 0
    assert result.metrics[-1]["external_validation"] == last["validation"]["external_validation"]
    assert last["test"]["external_test"] == pytest.approx(last["validation"]["external_validation"])


@pytest.mark.parametrize(
    ("overrides", "num_evaluated"),
    [(["evaluation.clients=1"], 1), (["evaluation.clients=cohort", "rounds.cohort_size=2"], 2), ([], 3)],
)
def test_who_is_evaluated(overrides: list[str], num_evaluated: int, tiny_config: Path) -> None:
    for record in _run(tiny_config, *overrides).metrics:
        assert sum("eval_loss" in own for own in record["clients"].values()) == num_evaluated


def test_evaluating_only_sometimes(tiny_config: Path) -> None:
    result = _run(tiny_config, "evaluation.every=2", "rounds.num_rounds=3")
    assert [record["eval_loss"] is None for record in result.metrics] == [True, False, False]
    assert result.summary["best"]["round_num"] in (2, 3)


OPTIONS = [
    ["local.optimizer=sgd", "local.learning_rate=0.02", "local.weight_decay=0.01"],
    ["local.local_epochs=1", "local.local_steps=null"],
    ["local.accumulation=3", "local.max_grad_norm=0.1"],
    ["local.schedule=linear", "local.warmup_rounds=1", "local.optimizer_state=keep"],
    ["local.learning_rate_a_ratio=0"],
    ["lora.dropout=0.2", "lora.target_modules=all-linear", "lora.rank=100"],
    ["data.loss_on=all", "data.template=alpaca"],
    ["data.columns={prompt: null, response: response}"],
    ["data.template=chat"],
    ["partition={scheme: iid, num_clients: 4}"],
    ["partition={scheme: dirichlet, num_clients: 3, column: topic, concentration: 1}"],
    ["partition={scheme: shards, num_clients: 4, column: topic}"],
    ["partition={scheme: quantity, num_clients: 3, concentration: 2}"],
    ["data.group=prompt"],
    ["model.gradient_checkpointing=true"],
    ["model.dtype=bfloat16"],
    ["lora.num_clients=12.5"],
]


@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda overrides: ",".join(overrides)[:50])
def test_every_option_runs_and_its_loss_falls(overrides: list[str], tiny_config: Path, capsys: Capsys) -> None:
    outcome = sfedlora(capsys, "run", tiny_config, *overrides)
    assert outcome.code == 0, outcome.err
    summary = json.loads((tiny_config.parent / "run" / "summary.json").read_text(encoding="utf-8"))
    losses = [summary[when]["validation"]["weighted"]["eval_loss"] for when in ("initial", "last")]
    assert losses[1] < losses[0]
    assert "initial" in outcome.out
    assert sfedlora(capsys, "evaluate", tiny_config.parent / "run").code == 0


def test_a_run_stops_with_3_when_every_client_diverges(tiny_config: Path, tmp_path: Path, capsys: Capsys) -> None:
    outcome = sfedlora(capsys, "run", tiny_config, "local.optimizer=sgd", "lora.alpha=1e9", "local.learning_rate=1e30")
    assert outcome.code == 3
    assert outcome.err.splitlines()[-1].startswith("run failed: round 1: every client of the cohort failed")
    assert "lower local.learning_rate" in outcome.err
    assert "Traceback" not in outcome.err
    assert (tmp_path / "run" / "checkpoints" / "round-000000").is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert sfedlora(capsys, "resume", tmp_path / "run").code == 3


def test_a_client_that_diverges_is_left_out_and_recorded(tiny_config: Path, tmp_path: Path, capsys: Capsys) -> None:
    """After one SGD step from B = 0, B is -rate * gradient; the rate lets only the largest of them overflow float32."""
    one_step = ["local.optimizer=sgd", "local.local_steps=1", "rounds.num_rounds=1", "lora.alpha=1e12"]
    probe = _adapters(_run(tiny_config, *one_step, "local.learning_rate=1", f"output={tmp_path / 'probe'}"))
    largest = {
        client: max(float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name)
        for client, tensors in probe.items()
    }
    first, second = sorted(largest, key=lambda client: -largest[client])[:2]
    rate = 3.4e38 / math.sqrt(largest[first] * largest[second])
    outcome = sfedlora(capsys, "run", tiny_config, *one_step, f"local.learning_rate={rate!r}")
    assert outcome.code == 0, outcome.err
    assert f"excluded: client {first!r}, round 1, training" in outcome.err
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8"))
    assert set(record["excluded"]) == {first}
    assert "became NaN or infinite at or before local step 1" in record["excluded"][first]
    assert first not in {path.name for path in (tmp_path / "run" / "adapters" / "clients").iterdir()}
    assert "train_loss" not in record["clients"][first]
    assert record["effective_cohort_size"] < 2.01


# classification


def _classification(folder: Path, *, pair: bool, **sections: object) -> Path:
    model = save_tiny_checkpoint(tiny_bert_classifier(), folder / "model", pad_token="<pad>")
    lines = []
    for row in range(90):
        label = row % 3
        words = " ".join(f"w{3 + (7 * row + step) % 50}" for step in range(5))
        content: dict[str, Any] = {"text": f"w{55 + label} {words}", "label": ["bad", "good", "so-so"][label]}
        if pair:
            content["other"] = f"w{60 + row % 5} {words}"
        lines.append(json.dumps(content) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return write_config(
        folder / "run.yaml",
        model={"source": str(model), "task": "sequence-classification"},
        data={"source": str(folder / "rows.jsonl"), "columns": {"text_pair": "other"} if pair else {}},
        partition={"scheme": "iid", "column": None, "num_clients": 3},
        local={"local_steps": 8, "learning_rate": 2e-2},
        output=str(folder / "run"),
        **sections,
    )


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("head", ["personal", "shared"])
def test_classification_with_its_head(pair: bool, head: str, tmp_path: Path) -> None:
    result = _run(_classification(tmp_path, pair=pair), f"method.head={head}", "rounds.num_rounds=3")
    for when in ("initial", "last", "best"):
        assert set(result.summary[when]["test"]["weighted"]) == {"eval_loss", "accuracy", "macro_f1"}
    for record in result.metrics:
        assert 0 <= record["macro_f1"] <= 1
        assert 0 <= record["accuracy"] <= 1
        assert "perplexity" not in record
    first, second = list(_adapters(result).values())[:2]
    heads = [name for name in first if "classifier" in name]
    assert len(heads) == 2, "weight and bias of the head are saved with the adapter"
    assert all(torch.equal(first[name], second[name]) for name in heads) is (head == "shared")
    assert (
        result.summary["last"]["validation"]["weighted"]["eval_loss"]
        < (result.summary["initial"]["validation"]["weighted"]["eval_loss"])
    )


def test_classification_adapters_give_our_logits_in_stock_peft(tmp_path: Path) -> None:
    result = _run(_classification(tmp_path, pair=False))
    prepared, state = load_state(result.run_dir)
    resident = prepared.federation.resident
    assert prepared.label_names == ("bad", "good", "so-so")
    ids = torch.arange(3, 43).reshape(2, 20)
    for client in state.personal:
        resident.load(serving_adapter(prepared.federation, state, client))
        resident.scaling = prepared.federation.sizes.server.scaling
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
        theirs = PeftModel.from_pretrained(base, str(result.adapter(client))).eval()
        with torch.no_grad():
            ours, stock = resident.model(ids).logits, theirs(ids).logits
        assert float((ours - stock).abs().max()) <= 1e-5 * float(stock.abs().max())


def test_a_merged_classifier_keeps_its_labels(tmp_path: Path, capsys: Capsys) -> None:
    result = _run(_classification(tmp_path, pair=False))
    outcome = sfedlora(capsys, "export", result.run_dir, tmp_path / "merged", "--merged", "--client", "1")
    assert outcome.code == 0, outcome.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "bad", 1: "good", 2: "so-so"}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    theirs = PeftModel.from_pretrained(base, str(result.adapter("1"))).eval()
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert float((merged(ids).logits - theirs(ids).logits).abs().max()) <= 1e-4
