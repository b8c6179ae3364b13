"""A finished run's directory: exactly the promised files and keys, and numbers that stock PEFT gives back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from sfedlora import RunConfig, RunResult, run
from sfedlora.experiment import load_state
from sfedlora.federation.state import serving_adapter
from support.command_line import sfedlora
from support.stock import causal_model, plain_encoding, response_loss, rows_of, tokenizer_of

SOURCE = Path(__file__).parents[2] / "src" / "sfedlora" / "assets" / "tiny_chat.jsonl"
ROUND_KEYS = {
    "schema_version", "round_num", "cohort", "train_loss", "eval_loss", "eval_loss_unweighted", "perplexity",
    "perplexity_unweighted", "grad_norm_a", "grad_norm_b", "gain", "scaling", "effective_clients",
    "effective_cohort_size", "bytes_up", "bytes_down", "train_seconds", "aggregate_seconds", "eval_seconds", "tokens",
    "padded_tokens", "excluded", "clients", "clients_per_batch",
}  # fmt: skip
TRAINED_KEYS = {"train_loss", "num_steps", "grad_norm_a", "grad_norm_b"}
EVALUATED_KEYS = {"num_examples", "num_evaluated", "eval_loss", "perplexity"}


def _partition(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "partition.json").read_text(encoding="utf-8"))
    return content


def test_it_holds_exactly_the_promised_files(finished: RunResult) -> None:
    here = finished.run_dir
    names = {path.name for path in here.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "partition.json", "metrics.jsonl", "summary.json", "adapters", "checkpoints",
    }  # fmt: skip
    cohorts = {client for record in finished.metrics for client in record["cohort"]}
    adapters = {str(path.relative_to(here / "adapters").parent) for path in (here / "adapters").rglob("*.safetensors")}
    assert adapters == {"shared", *(f"clients/{client}" for client in cohorts)}
    for folder in adapters:
        files = {path.name for path in (here / "adapters" / folder).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
    kept = {path.name for path in (here / "checkpoints").iterdir()}
    best = finished.summary["best"]["round_num"]
    assert kept == {"personal", *(f"round-{number:06d}" for number in {2, 3, best})}
    stored = {path.relative_to(here / "checkpoints" / "personal") for path in here.glob("checkpoints/personal/*/*")}
    assert {path.name for path in stored} == {f"{client}.safetensors" for client in cohorts}
    last = {client: max(r["round_num"] for r in finished.metrics if client in r["cohort"]) for client in cohorts}
    assert stored >= {Path(f"{number:06d}/{client}.safetensors") for client, number in last.items()}
    assert not [path for path in here.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def test_metrics_have_exactly_the_promised_keys_and_sensible_values(finished: RunResult) -> None:
    assert [record["round_num"] for record in finished.metrics] == [1, 2, 3]
    partition = _partition(finished.run_dir)["clients"]
    for record in finished.metrics:
        assert set(record) == ROUND_KEYS
        assert record["schema_version"] == 1
        assert len(record["cohort"]) == 2
        assert set(record["clients"]) == set(partition), "all clients are evaluated"
        for client, own in record["clients"].items():
            assert set(own) == EVALUATED_KEYS | (TRAINED_KEYS if client in record["cohort"] else set())
            assert own["num_evaluated"] == len(partition[client]["validation"])
        trained = [record["clients"][client] for client in record["cohort"]]
        assert [own["num_examples"] for own in trained] == [len(partition[c]["train"]) for c in record["cohort"]]
        assert [own["num_steps"] for own in trained] == [2, 2]
        weights = [own["num_examples"] / sum(o["num_examples"] for o in trained) for own in trained]
        assert record["train_loss"] == pytest.approx(
            sum(w * own["train_loss"] for w, own in zip(weights, trained, strict=True))
        )
        assert record["effective_cohort_size"] == pytest.approx(1 / sum(w * w for w in weights))
        assert record["grad_norm_b"] == pytest.approx(sum(own["grad_norm_b"] for own in trained) / 2)
        assert record["perplexity"] == pytest.approx(math.exp(record["eval_loss"]))
        counted = [own["num_evaluated"] for own in record["clients"].values()]
        losses = [own["eval_loss"] for own in record["clients"].values()]
        assert record["eval_loss"] == pytest.approx(sum(map(lambda n, x: n * x, counted, losses)) / sum(counted))
        assert record["eval_loss_unweighted"] == pytest.approx(sum(losses) / len(losses))
        assert record["excluded"] == {}
        assert record["tokens"] > 0
        assert 0 <= record["padded_tokens"] <= record["tokens"]
        assert min(record["train_seconds"], record["aggregate_seconds"], record["eval_seconds"]) > 0
    assert finished.metrics[0]["grad_norm_a"] == 0.0, "B is zero at the start, so A has no gradient yet"


def test_gamma_gain_and_bytes_are_those_of_the_formulas(finished: RunResult) -> None:
    shared = load_file(finished.run_dir / "adapters" / "shared" / "adapter_model.safetensors")
    num_a = sum(tensor.numel() for name, tensor in shared.items() if "lora_A" in name)
    sizes = [len(own["train"]) for own in _partition(finished.run_dir)["clients"].values()]
    count = sum(sizes) ** 2 / sum(size**2 for size in sizes)
    gamma = 8 * math.sqrt(count / 4)
    for record in finished.metrics:
        assert record["effective_clients"] == pytest.approx(count)
        assert record["scaling"] == pytest.approx(gamma)
        assert record["bytes_up"] == record["bytes_down"] == 2 * 4 * num_a
    # Variance 1 / (3 in) of each draw, divided by N in the mean: gamma^2 ||A||^2 / in = alpha^2 / (3 in) on average.
    widths = [tensor.shape[1] for name, tensor in shared.items() if "lora_A" in name]
    expected = sum(64 / (3 * width) for width in widths) / len(widths)
    assert finished.metrics[0]["gain"] == pytest.approx(expected, rel=0.1)


def test_the_partition_is_of_the_source_and_covers_it_once(finished: RunResult) -> None:
    partition = _partition(finished.run_dir)
    assert partition["source_sha256"] == hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    rows = rows_of(SOURCE)
    seen: list[int] = []
    for client, own in partition["clients"].items():
        assert set(own) == {"dir", "train", "validation", "test"}
        every = own["train"] + own["validation"] + own["test"]
        assert {rows[row]["topic"] for row in every} == {client}
        assert min(len(own["train"]), len(own["validation"]), len(own["test"])) >= 1
        seen += every
    assert len(seen) == len(set(seen))


def test_the_environment_names_versions_model_and_scaling(finished: RunResult) -> None:
    environment = json.loads((finished.run_dir / "environment.json").read_text(encoding="utf-8"))
    assert environment["versions"]["torch"] == torch.__version__
    weights = SOURCE.parent / "tiny_llama" / "model.safetensors"
    assert environment["base_model"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert environment["threads"] == 1
    assert environment["seed"] == 0
    scaling = environment["scaling"]
    assert scaling["measured_effective_clients"] == pytest.approx(scaling["effective_clients"], rel=0.2)


def test_the_stated_validation_loss_comes_out_of_stock_peft_and_the_source_alone(finished: RunResult) -> None:
    rows = rows_of(SOURCE)
    last = finished.metrics[-1]
    partition = _partition(finished.run_dir)["clients"]
    adapters = finished.run_dir / "adapters" / "clients"
    checked = 0
    for client, own in partition.items():
        if not (adapters / own["dir"]).is_dir():
            continue
        tokenizer = tokenizer_of(adapters / own["dir"])
        encoded = [plain_encoding(rows[row], tokenizer, 64) for row in own["validation"]]
        loss = response_loss(causal_model(adapters / own["dir"]), encoded)
        assert loss == pytest.approx(last["clients"][client]["eval_loss"], abs=1e-4)
        checked += 1
    assert checked >= 2


def test_the_stated_test_loss_too(finished: RunResult) -> None:
    rows = rows_of(SOURCE)
    partition = _partition(finished.run_dir)["clients"]
    total, count = 0.0, 0
    for own in partition.values():
        adapter = finished.run_dir / "adapters" / "clients" / own["dir"]
        folder = adapter if adapter.is_dir() else finished.run_dir / "adapters" / "shared"  # B of a newcomer is zero
        tokenizer = tokenizer_of(folder)
        loss = response_loss(causal_model(folder), [plain_encoding(rows[row], tokenizer, 64) for row in own["test"]])
        total += loss * len(own["test"])
        count += len(own["test"])
    assert total / count == pytest.approx(finished.summary["last"]["test"]["weighted"]["eval_loss"], abs=1e-4)


def test_every_adapter_gives_our_logits_in_stock_peft(finished: RunResult) -> None:
    prepared, state = load_state(finished.run_dir)
    resident = prepared.federation.resident
    ids = torch.arange(3, 43).reshape(2, 20)
    assert state.personal
    for client in state.personal:
        resident.load(serving_adapter(prepared.federation, state, client))
        resident.scaling = prepared.federation.sizes.server.scaling
        with torch.no_grad():
            ours = resident.model(ids).logits
            theirs = causal_model(finished.adapter(client))(ids).logits
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_the_shared_adapter_has_zero_b_and_the_clients_differ(finished: RunResult) -> None:
    shared = load_file(finished.adapter() / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in shared.items() if "lora_B" in name)
    own = [load_file(path) for path in (finished.run_dir / "adapters" / "clients").glob("*/*.safetensors")]
    assert len(own) >= 2
    for tensors in own:
        assert all(torch.equal(tensors[name], shared[name]) for name in shared if "lora_A" in name)
    names = [name for name in shared if "lora_B" in name]
    assert all(not torch.equal(own[0][name], own[1][name]) for name in names)


def test_config_yaml_runs_again_to_the_same_bits(finished: RunResult, tmp_path: Path) -> None:
    again = run(RunConfig.load(finished.run_dir / "config.yaml", [f"output={tmp_path / 'again'}"]))
    assert again.summary == finished.summary
    for path in (finished.run_dir / "adapters").rglob("*.*"):
        other = again.run_dir / path.relative_to(finished.run_dir)
        assert other.read_bytes() == path.read_bytes()


def test_config_yaml_has_no_auto_left(finished: RunResult) -> None:
    resolved = RunConfig.load(finished.run_dir / "config.yaml")
    assert "auto" not in (finished.run_dir / "config.yaml").read_text(encoding="utf-8").split()
    assert resolved.lora.init == "independent"
    assert resolved.threads == 1


def test_summary_has_initial_last_and_best(finished: RunResult) -> None:
    summary = finished.summary
    assert set(summary) == {"initial", "last", "best", "store_bytes"}
    stored = (finished.run_dir / "checkpoints" / "personal").rglob("*.safetensors")
    assert summary["store_bytes"] == sum(path.stat().st_size for path in stored)
    assert summary["last"]["round_num"] == 3
    losses = {record["round_num"]: record["eval_loss"] for record in finished.metrics}
    assert summary["best"]["round_num"] == min(losses, key=lambda number: losses[number])
    for name in ("last", "best"):
        stated = summary[name]["validation"]["weighted"]["eval_loss"]
        assert stated == pytest.approx(losses[summary[name]["round_num"]], rel=1e-6)
    assert (
        summary["last"]["validation"]["weighted"]["eval_loss"]
        < summary["initial"]["validation"]["weighted"]["eval_loss"]
    )


def test_the_evaluate_verb_gives_the_summary(finished: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("validation", "test"):
        for which in ("last", "best"):
            outcome = sfedlora(capsys, "evaluate", finished.run_dir, "--split", split, "--round", which)
            assert outcome.code == 0, outcome.err
            content = json.loads(outcome.out)
            assert content["weighted"] == finished.summary[which][split]["weighted"]
            assert content["unweighted"] == finished.summary[which][split]["unweighted"]
    client = next(iter(_partition(finished.run_dir)["clients"]))
    one = json.loads(sfedlora(capsys, "evaluate", finished.run_dir, "--split", "train", "--client", client).out)
    assert list(one["clients"]) == [client]
    assert one["clients"][client]["num_examples"] == len(_partition(finished.run_dir)["clients"][client]["train"])


def test_evaluate_on_another_file(finished: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partition = _partition(finished.run_dir)["clients"]
    client = finished.metrics[-1]["cohort"][0]
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    own = tmp_path / "own.jsonl"
    own.write_text("".join(lines[row] + "\n" for row in partition[client]["validation"]), encoding="utf-8")
    outcome = sfedlora(capsys, "evaluate", finished.run_dir, "--data", own, "--client", client)
    stated = finished.metrics[-1]["clients"][client]["eval_loss"]
    assert json.loads(outcome.out)["unweighted"]["eval_loss"] == pytest.approx(stated, rel=1e-6)


def test_unknown_clients_and_rounds_are_named(finished: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    verbs: list[list[str | Path]] = [
        ["evaluate", finished.run_dir],
        ["export", finished.run_dir, finished.run_dir.parent / "target"],
    ]
    for verb in verbs:
        outcome = sfedlora(capsys, *verb, "--client", "astrology")
        assert outcome.code == 2
        assert "no client 'astrology'" in outcome.err
        assert finished.metrics[0]["cohort"][0] in outcome.err
        outcome = sfedlora(capsys, *verb, "--round", "17")
        assert outcome.code == 2
        assert "17" in outcome.err
        assert "kept are rounds" in outcome.err
        outcome = sfedlora(capsys, *verb, "--round", "first")
        assert outcome.code == 2
        assert "last, best or a round number" in outcome.err
    assert not (finished.run_dir.parent / "target").exists()


def test_export_writes_the_same_adapters(
    finished: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = sfedlora(capsys, "export", finished.run_dir, tmp_path / "all")
    assert outcome.code == 0, outcome.err
    for path in (finished.run_dir / "adapters" / "clients").iterdir():
        exported = tmp_path / "all" / path.name / "adapter_model.safetensors"
        assert exported.read_bytes() == (path / "adapter_model.safetensors").read_bytes()
        LoraConfig.from_pretrained(str(tmp_path / "all" / path.name))
    assert (tmp_path / "all" / "shared").is_dir()
    again = sfedlora(capsys, "export", finished.run_dir, tmp_path / "all")
    assert again.code == 2
    assert "already exists and is not empty" in again.err
    client = finished.metrics[0]["cohort"][0]
    one = sfedlora(capsys, "export", finished.run_dir, tmp_path / "one", "--client", client, "--round", "2")
    assert one.code == 0, one.err
    assert [path.name for path in (tmp_path / "one").iterdir()] == [client]


def test_export_merged_gives_the_adapters_logits(
    finished: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = finished.metrics[-1]["cohort"][0]
    outcome = sfedlora(capsys, "export", finished.run_dir, tmp_path / "merged", "--merged", "--client", client)
    assert outcome.code == 0, outcome.err
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a")["input_ids"]
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        theirs = causal_model(finished.adapter(client))(ids).logits
        plain = merged(ids).logits
    assert float((plain - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert not [path for path in tmp_path.iterdir() if path.name != "merged"]
    two = sfedlora(capsys, "export", finished.run_dir, tmp_path / "x", "--merged", "--client", "a", "--client", "b")
    assert two.code == 2


def test_a_moved_run_is_as_good(finished: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copytree(finished.run_dir, tmp_path / "elsewhere")
    outcome = sfedlora(capsys, "evaluate", moved)
    assert json.loads(outcome.out)["weighted"] == finished.summary["last"]["test"]["weighted"]
    outcome = sfedlora(capsys, "resume", moved)
    assert outcome.code == 0
    assert str(moved) in outcome.out.replace("\n", "")
