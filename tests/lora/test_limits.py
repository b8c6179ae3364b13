"""How many token ids and tokens the families read, by the numbers their configurations were made with."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from sfedlora.lora.limits import input_limits
from support.tiny_models import (
    VOCAB_SIZE,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_qwen2,
    tiny_roberta_classifier,
    tiny_t5_encoder,
)

TABLES = {
    "bert": (tiny_bert_classifier, 64),
    "gpt2": (tiny_gpt2, 64),
    "opt": (tiny_opt, 64),
    "roberta": (tiny_roberta_classifier, 62),
}


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_is_used_to_its_last_row_and_no_further(family: str) -> None:
    make, longest = TABLES[family]
    model = make()
    assert input_limits(model).max_tokens == longest
    with torch.no_grad():
        assert model(input_ids=torch.full((1, longest), 5)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("model", [tiny_llama(), tiny_qwen2(), tiny_t5_encoder()], ids=["llama", "qwen2", "t5"])
def test_computed_positions_have_no_limit(model: PreTrainedModel) -> None:
    limits = input_limits(model)
    assert limits.max_tokens is None
    assert limits.num_embeddings == VOCAB_SIZE
