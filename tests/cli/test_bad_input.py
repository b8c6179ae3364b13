"""Bad input through the command line: one message on standard error, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.command_line import Outcome, sfedlora, write_config
from support.tiny_models import save_tiny_checkpoint, tiny_bert_classifier, tiny_llama

ASSETS = Path(__file__).parents[2] / "src" / "sfedlora" / "assets"
Capsys = pytest.CaptureFixture[str]


def refused(outcome: Outcome, *parts: str, output: Path | None = None) -> None:
    """Exit 2 with one message that has all these parts; no output folder."""
    assert outcome.code == 2, outcome.err
    messages = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err
    assert outcome.out == ""
    if output is not None:
        assert not output.exists()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", output=str(tmp_path / "out"))


YAML_HEAD = (
    "model:\n  source: package:sfedlora/assets/tiny_llama\ndata: {source: package:sfedlora/assets/tiny_chat.jsonl}\n"
)

FILES = {
    "unknown key": (YAML_HEAD + "lora:\n  rnk: 4\n", ["line 5", "unknown key 'lora.rnk'", "did you mean 'rank'?"]),
    "unknown section": (YAML_HEAD + "lorra: {rank: 4}\n", ["line 4", "unknown key 'lorra'", "did you mean 'lora'?"]),
    "wrong type": (YAML_HEAD + "lora:\n  rank: eight\n", ["line 5", "lora.rank", "integer", "'eight'"]),
    "not a whole number": (YAML_HEAD + "lora: {rank: 8.5}\n", ["line 4", "lora.rank", "integer", "8.5"]),
    "bool for a number": (YAML_HEAD + "lora: {rank: true}\n", ["line 4", "lora.rank", "integer", "True"]),
    "value for a section": (YAML_HEAD + "lora: 8\n", ["line 4", "lora", "8"]),
    "list for text": (YAML_HEAD + "seed: [1, 2]\n", ["line 4", "seed", "integer"]),
    "key of another type": (YAML_HEAD + "7: 8\n", ["line 4", "7: keys should be strings"]),
    "duplicate key": (YAML_HEAD + "seed: 1\nseed: 2\n", ["line 5", "seed was already given on line 4"]),
    "duplicate in a section": (YAML_HEAD + "lora: {rank: 1, alpha: 2, rank: 3}\n", ["line 4", "lora.rank"]),
    "unknown preset": (YAML_HEAD + "preset: fedsaa\n", ["line 4: preset: unknown preset 'fedsaa'", "did you mean"]),
    "missing section": ("model: {source: x}\n", ["data is required", "partition is required"]),
    "empty": ("", ["the file is empty", "model, data and partition"]),
    "only a comment": ("# nothing\n", ["the file is empty"]),
    "a list": ("- a\n- b\n", ["expected a mapping"]),
    "truncated": ("model: {source: a\ndata", ["line", "not valid YAML"]),
    "tab": ("model:\n\tsource: a\n", ["line 2", "not valid YAML"]),
    "python object": ("model: !!python/object/apply:os.system [echo]\n", ["line 1", "not valid YAML"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
    "alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)),
        ["aliases"],
    ),
    "alias of itself": ("model: &m {source: *m}\n", ["not valid YAML"]),
    "merge bomb": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)),
        ["a"],
    ),
    "deep nesting": ("a: " + "[" * 5000 + "]" * 5000, ["not valid YAML"]),
    "huge number": (YAML_HEAD + f"seed: {'9' * 6000}\n", ["not valid YAML"]),
    "infinite rate": (YAML_HEAD + "local: {learning_rate: .inf}\n", ["line 4", "local.learning_rate", "finite"]),
    "no number": (YAML_HEAD + "local: {learning_rate: .nan}\n", ["line 4", "local.learning_rate"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_file_that_cannot_be_used(name: str, tmp_path: Path, capsys: Capsys) -> None:
    content, parts = FILES[name]
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    refused(sfedlora(capsys, "run", path, f"output={tmp_path / 'out'}"), *parts, output=tmp_path / "out")


def test_a_message_stays_short_for_a_huge_value(tmp_path: Path, capsys: Capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML_HEAD + "lora: {rank: " + "x" * 50_000 + "}\n", encoding="utf-8")
    outcome = sfedlora(capsys, "run", path)
    refused(outcome, "lora.rank")
    assert len(outcome.err) < 2000


OVERRIDES = {
    "rank 0": (["lora.rank=0"], ["lora.rank", "greater than 0", "0"]),
    "negative rank": (["lora.rank=-3"], ["lora.rank", "greater than 0", "-3"]),
    "negative alpha": (["lora.alpha=-1"], ["lora.alpha", "greater than 0", "-1"]),
    "negative seed": (["seed=-1"], ["seed", "greater than or equal to 0", "-1"]),
    "no rounds": (["rounds.num_rounds=0"], ["rounds.num_rounds", "greater than 0"]),
    "cohort over clients": (["rounds.cohort_size=9"], ["rounds.cohort_size is 9", "only 3 clients"]),
    "cohort over found clients": (
        ["partition.num_clients=null", "rounds.cohort_size=9"],
        ["rounds.cohort_size is 9", "only 8 clients"],
    ),
    "no equals sign": (["lora.rank"], ["'lora.rank'", "expected key=value"]),
    "no key": (["=3"], ["'=3'", "expected key=value"]),
    "no YAML": (["lora.rank=[1"], ["'[1'", "not a YAML value"]),
    "huge number": (["seed=" + "9" * 5000], ["not a YAML value"]),
    "through a value": (["lora.rank.x=1"], ["override lora.rank.x", "a value, not a section"]),
    "unknown key": (["lora.rnk=3"], ["lora.rnk", "did you mean 'rank'?"]),
    "unknown preset": (["preset=sfed-lorra"], ["preset", "'sfed-lorra'", "did you mean 'sfed-lora'?", "fedit"]),
    "unknown method": (["method.name=fedsaa"], ["method.name", "'fedsa'", "'fedsaa'"]),
    "unknown scaling": (["lora.scaling=sqrt"], ["lora.scaling", "'rslora'", "'sqrt'"]),
    "unknown device": (["device=tpu9"], ["device", "'tpu9'", "auto"]),
    "a device that computes nothing": (["device=meta"], ["device", "'meta'", "cuda:N"]),
    "a model name that is too long": (["model.source=" + "x" * 300], ["cannot be used as a path", "too long"]),
    "a data name that is too long": (["data.source=" + "x" * 300], ["cannot be used as a path", "too long"]),
    "a home folder of nobody": (["data.source=~nosuchuser/x"], ["'~nosuchuser/x'", "no such home folder"]),
    "NUL in a path": (['output="a\\0b"'], ["output", "NUL", "'a\\x00b'"]),
    "invalid Unicode": (['data.group="\\ud800"'], ["data.group", "invalid Unicode"]),
    "threads without end": (["threads=1000000000000"], ["threads", "less than or equal to 1024"]),
    "a rank beyond memory": (["lora.rank=100000000000"], ["lora.rank", "less than or equal to 1000000"]),
    "steps without end": (["local.local_steps=" + "9" * 23], ["local.local_steps", "less than or equal to 1000000"]),
    "accumulation without end": (["local.accumulation=" + "9" * 20], ["local.accumulation", "less than or equal"]),
    "passes without end": (["local.accumulation=600000"], ["local_steps 2 times accumulation", "lower one"]),
    "a length without end": (["data.max_length=" + "9" * 20], ["data.max_length", "less than or equal to 1000000"]),
    "clients beyond float32": (["lora.num_clients=1e200"], ["lora.num_clients", "less than or equal to 1"]),
    "no such GPU": (["device=cuda:7"], ["device", "cuda:7"]),
    "a rate beyond float32": (["local.learning_rate=1e60"], ["local.learning_rate", "less than or equal to 1000000"]),
    "alpha beyond float32": (["lora.alpha=1e200"], ["lora.alpha", "less than or equal to 1000000"]),
    "unknown optimizer": (["local.optimizer=lion"], ["local.optimizer", "'adamw'", "'lion'"]),
    "steps and epochs": (["local.local_epochs=1", "local.local_steps=1"], ["exactly one of local_steps"]),
    "split": (["data.split=[0.8,0.1,0.2]"], ["split must add up to 1"]),
    "split of two": (["data.split=[0.8,0.2]"], ["data.split"]),
    "unknown role": (["data.columns={promt: a}"], ["unknown role 'promt'", "prompt"]),
    "reinit without average": (["lora.init=reinit", "method.name=local"], ["reinit", "'local'"]),
    "warmup": (["local.warmup_rounds=9"], ["local.warmup_rounds is 9", "2 rounds"]),
    "target module": (["lora.target_modules=[q_prj]"], ["q_prj", "matches nothing", "q_proj", "down_proj"]),
    "regular expression": (["lora.target_modules='('"], ["not a regular expression"]),
    "a module that is not linear": (["lora.target_modules=[embed_tokens]"], ["embed_tokens", "linear"]),
    "no label to deal by": (["partition={scheme: dirichlet, num_clients: 2}"], ["dirichlet", "partition.column"]),
    "no number of clients": (["partition={scheme: iid}"], ["partition.num_clients"]),
    "too few examples": (
        ["partition={scheme: iid, num_clients: 400}"],
        ["480 examples are too few for 400 clients", "min_examples"],
    ),
    "a client left empty": (
        ["partition={scheme: quantity, num_clients: 40, concentration: 0.001, min_examples: 1}"],
        ["in 100 draws", "smallest had", "min_examples"],
    ),
    "too many values": (["partition.num_clients=9"], ["only 8 of 8 column values", "expected 9"]),
    "column of the partition": (["partition.column=tpic"], ["no column 'tpic'", "'topic'"]),
    "column of the prompt": (["data.columns={prompt: question}"], ["no column 'question'", "'prompt'", "'response'"]),
    "group column": (["data.group=thread"], ["no column 'thread'", "'topic'"]),
    "data not found": (["data.source=nowhere/rows.jsonl"], ["nowhere/rows.jsonl", "file not found"]),
    "data package": (["data.source=package:not_there_at_all/x"], ["not_there_at_all", "not installed"]),
    "data in package": (["data.source=package:sfedlora/assets/no.jsonl"], ["no.jsonl", "tiny_chat.jsonl"]),
    "out of the package": (["data.source=package:sfedlora/../../etc/passwd"], ["must stay inside the package"]),
    "validation not found": (["data.validation=nowhere.jsonl"], ["nowhere.jsonl", "file not found"]),
    "model not found": (["model.source=nowhere/model"], ["nowhere/model"]),
    "no labels": (["model.task=sequence-classification"], ["no column 'label'", "'topic'"]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_setting_that_cannot_be_used(name: str, config: Path, tmp_path: Path, capsys: Capsys) -> None:
    overrides, parts = OVERRIDES[name]
    refused(sfedlora(capsys, "run", config, *overrides), *parts, output=tmp_path / "out")


def test_a_configuration_that_is_no_file(tmp_path: Path, capsys: Capsys) -> None:
    refused(sfedlora(capsys, "run", tmp_path / "none.yaml"), "none.yaml", "no such file")
    refused(sfedlora(capsys, "run", tmp_path), str(tmp_path), "directory")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("# für\nmodel: {}\n".encode("latin-1"))
    refused(sfedlora(capsys, "run", latin), "line 1", "not UTF-8")
    weights = tmp_path / "weights.yaml"
    weights.write_bytes(bytes(2 << 20))
    refused(sfedlora(capsys, "run", weights), "no configuration file")


DATA_FILES = {
    "empty": ("rows.jsonl", b"", ["the file is empty"]),
    "only blank lines": ("rows.jsonl", b"\n\n", ["the file is empty"]),
    "truncated": ("rows.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": "c", "resp', ["line 2", "truncated"]),
    "not UTF-8": ("rows.jsonl", b'{"prompt": "\xff", "response": "b"}\n', ["not UTF-8", "line 1"]),
    "UTF-16": ("rows.jsonl", '{"prompt": "a"}'.encode("utf-16"), ["not UTF-8", "UTF-16"]),
    "not objects": ("rows.jsonl", b"[1, 2]\n", ["line 1", "object"]),
    "unknown kind": ("rows.docx", b"PK", ["docx", ".jsonl"]),
    "broken parquet": ("rows.parquet", b"PAR1 nothing", ["Parquet"]),
    "a number as text": ("rows.jsonl", b'{"prompt": "a", "response": 5}\n' * 40, ["response", "row 0", "5"]),
    "a missing text": ("rows.csv", b"prompt,response\n" + b"a,b\n" * 39 + b"a,\n", ["response", "row 39"]),
}


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_data_file_that_cannot_be_used(name: str, config: Path, tmp_path: Path, capsys: Capsys) -> None:
    file, content, parts = DATA_FILES[name]
    (tmp_path / file).write_bytes(content)
    iid = "partition={scheme: iid, num_clients: 2}"
    outcome = sfedlora(capsys, "run", config, f"data.source={tmp_path / file}", iid)
    refused(outcome, file, *parts, output=tmp_path / "out")


LABELS = {
    "a float": (0.5, ["label 0.5 (float)", "row 7", "integer or a string"]),
    "missing": (None, ["label a missing value", "row 7"]),
    "a list": ([1], ["label [1] (list)", "row 7"]),
    "another type": ("good", ["'good'", "row 7", "mixes strings and integers"]),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_label_that_cannot_be_used(name: str, tmp_path: Path, capsys: Capsys) -> None:
    label, parts = LABELS[name]
    model = save_tiny_checkpoint(tiny_bert_classifier(), tmp_path / "model", pad_token="<pad>")
    rows = [{"text": "w3 w4", "label": label if row == 7 else row % 2} for row in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = write_config(
        tmp_path / "run.yaml",
        model={"source": str(model), "task": "sequence-classification"},
        data={"source": str(tmp_path / "rows.jsonl")},
        partition={"scheme": "iid", "column": None, "num_clients": 2},
        output=str(tmp_path / "out"),
    )
    refused(sfedlora(capsys, "run", config), "rows.jsonl", "column 'label'", *parts, output=tmp_path / "out")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _other_weights(folder: Path) -> None:
    save_file({"something": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    "no weights": (_no_weights, ["has no weights", "model.safetensors"]),
    "only a pickle": (_only_pickle, ["pickled weights", "never read"]),
    "truncated weights": (_half_the_weights, ["model"]),
    "no config": (_no_config, ["no config.json"]),
    "broken config": (_broken_config, ["config.json"]),
    "no tokenizer": (_no_tokenizer, ["tokenizer"]),
    "other weights": (_other_weights, ["lacks", "weights"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_directory_that_cannot_be_used(name: str, config: Path, tmp_path: Path, capsys: Capsys) -> None:
    spoil, parts = MODELS[name]
    folder = shutil.copytree(ASSETS / "tiny_llama", tmp_path / "model")
    spoil(folder)
    outcome = sfedlora(capsys, "run", config, f"model.source={folder}")
    refused(outcome, str(tmp_path / "model"), *parts, output=tmp_path / "out")


def test_an_encoder_cannot_predict_the_next_token(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    model = save_tiny_checkpoint(tiny_bert_classifier(), tmp_path / "model", pad_token="<pad>")
    refused(sfedlora(capsys, "run", config, f"model.source={model}"), "bert", "causal-lm", output=tmp_path / "out")


def test_a_tokenizer_without_a_chat_template(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    model = save_tiny_checkpoint(tiny_llama(), tmp_path / "model", pad_token="<pad>")
    outcome = sfedlora(capsys, "run", config, f"model.source={model}", "data.template=chat")
    refused(outcome, "chat template", "'plain'", output=tmp_path / "out")


def test_examples_longer_than_the_model_can_read(tmp_path: Path, capsys: Capsys) -> None:
    model = save_tiny_checkpoint(tiny_bert_classifier(), tmp_path / "model", pad_token="<pad>")
    rows = [{"text": "w3 " * 70, "label": row % 2} for row in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = write_config(
        tmp_path / "run.yaml",
        model={"source": str(model), "task": "sequence-classification"},
        data={"source": str(tmp_path / "rows.jsonl"), "max_length": 100},
        partition={"scheme": "iid", "column": None, "num_clients": 2},
        output=str(tmp_path / "out"),
    )
    refused(sfedlora(capsys, "run", config), "data.max_length", "70 tokens", "at most 64", output=tmp_path / "out")


def test_an_override_is_not_blamed_on_a_line_of_the_file(config: Path, capsys: Capsys) -> None:
    outcome = sfedlora(capsys, "run", config, "lora.rank=0")
    assert outcome.err == "error: override lora.rank: input should be greater than 0, got 0\n"


def test_a_model_of_another_size_than_its_tokenizer(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = save_tiny_checkpoint(tiny_llama(), tmp_path / "model", pad_token="<pad>")
    shutil.copy(ASSETS / "tiny_llama" / "tokenizer.json", folder / "tokenizer.json")
    outcome = sfedlora(capsys, "run", config, f"model.source={folder}")
    refused(outcome, "token id", "has 67 embeddings", output=tmp_path / "out")


def test_an_output_that_is_taken_keeps_what_it_holds(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert sfedlora(capsys, "run", config).code == 0
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(sfedlora(capsys, "run", config, "seed=1"), "already holds another run", f"sfedlora resume {out}")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.txt").write_text("cat", encoding="utf-8")
    refused(sfedlora(capsys, "run", config, f"output={other}"), "already holds other files")
    refused(sfedlora(capsys, "run", config, f"output={other / 'cat.txt'}"), "cat.txt", "folder")
    refused(sfedlora(capsys, "run", config, f"output={other / 'cat.txt' / 'below'}"), "cat.txt", "folder")
    refused(sfedlora(capsys, "run", config, "output=/proc/sfedlora/run"), "/proc", "output")
    assert [path.name for path in other.iterdir()] == ["cat.txt"]


def test_verbs_on_a_folder_without_a_run(tmp_path: Path, capsys: Capsys) -> None:
    for arguments in (["resume"], ["evaluate"]):
        refused(sfedlora(capsys, *arguments, tmp_path), "no run directory", "config.yaml is missing")
        refused(sfedlora(capsys, *arguments, tmp_path / "none"), "no run directory")
    refused(sfedlora(capsys, "export", tmp_path, tmp_path / "target"), "no run directory", output=tmp_path / "target")
    merged = sfedlora(capsys, "export", tmp_path, tmp_path / "target", "--merged")
    refused(merged, "no run directory", output=tmp_path / "target")


def test_usage_errors_end_with_2(capsys: Capsys) -> None:
    for arguments in (["runn"], ["run"], ["run", "--no-such-option"], ["evaluate", ".", "--split", "dev"], []):
        outcome = sfedlora(capsys, *arguments)
        assert outcome.code == 2
        assert "Usage" in outcome.err + outcome.out
        assert "Traceback" not in outcome.err


def test_a_comparison_that_cannot_be_made(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "grid"

    def compare(*arguments: str) -> Outcome:
        return sfedlora(capsys, "compare", config, "--output", output, *arguments)

    refused(compare(), "nothing to compare", output=output)
    refused(compare("--vary", "lora.rank"), "'lora.rank'", "key=v1,v2", output=output)
    refused(compare("--vary", "lora.rank="), "empty value", output=output)
    refused(compare("--ranks", "4,,8"), "empty value", output=output)
    refused(compare("--ranks", "4,0"), "cell rank=0", "greater than 0", output=output)
    refused(compare("--methods", "fedit,fedsi"), "cell method=fedsi", "fedit", output=output)
    refused(compare("--ranks", "4", "--vary", "lora.rank=8"), "varied twice", output=output)
    refused(compare("--vary", "output=a,b"), "--output", output=output)
    refused(compare("output=a", "--ranks", "4,8"), "--output", output=output)
    refused(compare("--vary", "lora.rnk=4,8"), "did you mean 'rank'?", output=output)


def test_a_client_id_with_invalid_unicode(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    rows = [{"prompt": "a", "response": "b", "topic": topic} for topic in ("one", "\ud800two") for _ in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = sfedlora(capsys, "run", config, f"data.source={path}", "partition.num_clients=2")
    refused(outcome, "row 20 holds invalid Unicode", "ud800two", output=tmp_path / "out")


def test_a_cache_that_is_no_folder(
    config: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("SFEDLORA_CACHE", "/dev/null")
    outcome = sfedlora(capsys, "run", config, f"model.source={tmp_path / 'model.gguf'}")
    refused(outcome, "/dev/null", "SFEDLORA_CACHE", output=tmp_path / "out")


def test_names_that_are_too_long_for_a_finished_run(config: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert sfedlora(capsys, "run", config).code == 0
    long = "x" * 300
    refused(sfedlora(capsys, "evaluate", tmp_path / "out", "--data", long), "cannot be used as a path")
    for merged in ([], ["--merged"]):
        refused(sfedlora(capsys, "export", tmp_path / "out", tmp_path / long, *merged), "cannot be used", "too long")
