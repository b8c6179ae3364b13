"""Which modules are adapted or trained in full: the same ones as stock PEFT, or one clear error."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedModel

from sfedlora.errors import ModelError
from sfedlora.lora.inject import adapt
from sfedlora.lora.targets import find_head_modules, find_targets, minimal_suffixes
from support.tiny_models import (
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_classifier,
    tiny_opt,
    tiny_qwen2,
    tiny_roberta_classifier,
    tiny_t5_encoder,
)

BUILDERS = [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_opt, tiny_bert_classifier, tiny_roberta_classifier, tiny_t5_encoder]


def paths_by_peft(model: PreTrainedModel, target_modules: str | list[str] | None) -> list[str]:
    """What stock PEFT adapts, by the modules it really replaced."""
    config = LoraConfig(target_modules=target_modules, fan_in_fan_out="GPT2" in type(model).__name__)
    adapted = get_peft_model(model, config).base_model.model
    return [path for path, module in adapted.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("target_modules", ["default", "all-linear"])
def test_named_choices_adapt_what_peft_adapts(build: type, target_modules: str) -> None:
    model = build()
    found = find_targets(model, target_modules)
    assert [target.path for target in found] == paths_by_peft(
        build(), None if target_modules == "default" else target_modules
    )


@pytest.mark.parametrize(
    "target_modules",
    [
        r".*\.1\..*q_proj",
        ["q_proj"],
        ["0.self_attn.v_proj", "mlp.up_proj"],
        ["model.layers.1.mlp.down_proj"],
        ["lm_head"],
    ],
)
def test_patterns_and_suffixes_adapt_what_peft_adapts(target_modules: str | list[str]) -> None:
    found = [target.path for target in find_targets(tiny_qwen2(), target_modules)]
    assert found == paths_by_peft(tiny_qwen2(), target_modules)
    assert found


def test_sizes_of_linear_and_conv1d_modules() -> None:
    by_path = {target.path: target for target in find_targets(tiny_gpt2(), "all-linear")}
    attention, mlp = by_path["transformer.h.0.attn.c_attn"], by_path["transformer.h.1.mlp.c_fc"]
    assert (attention.in_features, attention.out_features) == (24, 72)
    assert (mlp.in_features, mlp.out_features) == (24, 96)


def test_no_match_lists_the_names_that_exist() -> None:
    with pytest.raises(
        ModelError, match=r"\['query'\] matches nothing in LlamaForCausalLM.*q_proj, k_proj, v_proj, o_proj"
    ):
        find_targets(tiny_llama(), ["query"])
    with pytest.raises(ModelError, match="'quary' matches nothing"):
        find_targets(tiny_llama(), "quary")
    with pytest.raises(ModelError, match="matches nothing"):
        find_targets(tiny_llama(), [])


def test_broken_patterns_and_modules_that_are_not_linear_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'\*q_proj' is not a regular expression"):
        find_targets(tiny_llama(), "*q_proj")
    with pytest.raises(ModelError, match=r"matches 'model\.embed_tokens', a Embedding"):
        find_targets(tiny_llama(), ["embed_tokens"])


def test_an_architecture_without_defaults_asks_for_names() -> None:
    model = tiny_llama()
    model.config.model_type = "brand_new"
    with pytest.raises(ModelError, match=r"'brand_new'.*all-linear.*q_proj"):
        find_targets(model, "default")


def test_an_adapted_model_is_not_adapted_again() -> None:
    model = tiny_llama()
    adapt(model, target_modules="default", rank=2)
    with pytest.raises(ModelError, match="adapted already"):
        find_targets(model, "default")


def test_targets_inside_the_head_are_left_out() -> None:
    model = tiny_roberta_classifier()
    head = find_head_modules(model, ["classifier"])
    assert head == ("classifier",)
    paths = [target.path for target in find_targets(model, "all-linear", head_paths=head)]
    assert paths
    assert not any(path.startswith("classifier") for path in paths)
    assert any(target.path == "classifier.dense" for target in find_targets(model, ["dense"]))


def test_head_names_match_as_in_peft() -> None:
    assert find_head_modules(tiny_bert_classifier(), ["pooler", "classifier"]) == ("bert.pooler", "classifier")
    assert find_head_modules(tiny_llama_classifier(), ["score"]) == ("score",)
    config = DistilBertConfig(vocab_size=11, dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    distilbert = DistilBertForSequenceClassification(config)
    assert find_head_modules(distilbert, ["classifier"]) == ("pre_classifier", "classifier")
    assert find_head_modules(tiny_llama(), []) == ()
    with pytest.raises(ModelError, match=r"'score' is not in BertForSequenceClassification.*bert, classifier"):
        find_head_modules(tiny_bert_classifier(), ["score"])


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["self_attn.q_proj"], ("q_proj",)),
        (["0.self_attn.q_proj"], ("0.self_attn.q_proj",)),
    ],
)
def test_suffixes_are_short_and_exact(target_modules: Sequence[str], expected: tuple[str, ...]) -> None:
    model = tiny_llama()
    targets = find_targets(model, target_modules)
    assert minimal_suffixes(model, targets) == expected
    assert find_targets(model, expected) == targets
