"""`sfedlora personalize`: what a new client gets, with stock PEFT as the judge, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sfedlora import RunConfig, run
from sfedlora.data.encode import encode_causal
from sfedlora.data.examples import load_examples
from sfedlora.data.splits import split_client
from support.command_line import sfedlora, write_config

Capture = pytest.CaptureFixture[str]
ASSETS = Path(__file__).parents[2] / "src" / "sfedlora" / "assets"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three topics, and the rows of a fourth."""
    path = tmp_path_factory.mktemp("personalize")
    rows = [json.loads(line) for line in (ASSETS / "tiny_chat.jsonl").read_text(encoding="utf-8").splitlines()]
    known, new = ([row for row in rows if (row["topic"] == "trivia-2") is is_new] for is_new in (False, True))
    for name, own in (("known", known), ("new", new)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    config = write_config(
        path / "run.yaml", data={"source": str(path / "known.jsonl")}, lora={"rank": 8}, output=str(path / "run")
    )
    run(RunConfig.load(config))
    (path / "known.jsonl").unlink()  # a new client has no one else's rows
    return path


@pytest.mark.parametrize("train_a", [False, True])
def test_a_new_client_gets_its_own_b(folder: Path, tmp_path: Path, capsys: Capture, train_a: bool) -> None:
    flags = ["--data", str(folder / "new.jsonl"), "--output", str(tmp_path / "own"), "--steps", "12"]
    outcome = sfedlora(capsys, "personalize", folder / "run", *flags, *(["--train-a"] if train_a else []))
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "own" / "personalize.json").read_text(encoding="utf-8"))
    losses = {row: record["metrics"][row]["test"]["eval_loss"] for row in ("untouched", "local-only", "personalized")}
    assert losses["personalized"] < losses["untouched"]
    assert losses["local-only"] < losses["untouched"]
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_llama")
    own = PeftModel.from_pretrained(base, tmp_path / "own").state_dict()
    stock = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_llama")
    shared = PeftModel.from_pretrained(stock, folder / "run" / "adapters" / "shared").state_dict()
    a_names = [name for name in own if "lora_A" in name]
    assert all(torch.equal(own[name], shared[name]) is not train_a for name in a_names)
    assert all(own[name].abs().max() > 0 for name in own if "lora_B" in name)


def test_stock_peft_gives_the_loss_that_was_reported(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--data", str(folder / "new.jsonl"), "--output", str(tmp_path / "own"), "--steps", "12"]
    assert sfedlora(capsys, "personalize", folder / "run", *flags).code == 0
    record = json.loads((tmp_path / "own" / "personalize.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_llama")
    columns = {"prompt": "prompt", "response": "response"}
    examples = load_examples(str(folder / "new.jsonl"))
    options = {"template": "plain", "loss_on": "response", "max_length": 48}
    encoded = encode_causal(examples, tokenizer, **columns, **options)  # type: ignore[arg-type]
    split = split_client(range(len(encoded)), client_id="new", seed=0)
    assert encoded.label_starts is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_llama"), tmp_path / "own")
    model.eval()
    loss, tokens = 0.0, 0
    for row in split.test:
        ids = torch.tensor(encoded.example_tokens(row).astype("int64"))[None]
        labels, begin = ids.clone(), int(encoded.label_starts[row])
        labels[:, :begin] = -100
        with torch.no_grad():
            count = ids.shape[1] - begin
            loss, tokens = loss + float(model(input_ids=ids, labels=labels).loss) * count, tokens + count
    assert loss / tokens == pytest.approx(record["metrics"]["personalized"]["test"]["eval_loss"], rel=1e-4)


def test_what_cannot_be_joined_is_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = ["--data", str(folder / "new.jsonl")]
    (tmp_path / "there").mkdir()
    outcome = sfedlora(capsys, "personalize", folder / "run", *data, "--output", tmp_path / "there")
    assert (outcome.code, "already exists" in outcome.err) == (2, True)
    outcome = sfedlora(capsys, "personalize", tmp_path, *data, "--output", tmp_path / "own")
    assert (outcome.code, "no run directory" in outcome.err) == (2, True)
    config = write_config(tmp_path / "run.yaml", preset="fedit", output=str(tmp_path / "fedit"))
    assert sfedlora(capsys, "run", config, "rounds.num_rounds=1").code == 0
    outcome = sfedlora(capsys, "personalize", tmp_path / "fedit", *data, "--output", tmp_path / "own")
    assert (outcome.code, "shares B as well" in outcome.err) == (2, True)
    assert not (tmp_path / "own").exists()
