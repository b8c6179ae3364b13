"""The families of models that parity tests run on, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedModel

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

__all__ = ["FAMILIES", "Family"]


class Family(NamedTuple):
    """A model and the modules of it that are trained in full."""

    build: Callable[[], PreTrainedModel]
    head_modules: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return "sequence-classification" if self.head_modules else "causal-lm"

    @property
    def peft_task(self) -> str | None:
        return "SEQ_CLS" if self.head_modules else None


FAMILIES = {
    "llama": Family(tiny_llama),
    "llama-classifier": Family(tiny_llama_classifier, ("score",)),
    "qwen2": Family(tiny_qwen2),
    "gpt2": Family(tiny_gpt2),
    "opt": Family(tiny_opt),
    "bert": Family(tiny_bert_classifier, ("classifier",)),
    "bert-with-new-pooler": Family(tiny_bert_classifier, ("pooler", "classifier")),
    "roberta": Family(tiny_roberta_classifier, ("classifier",)),
    "t5-encoder": Family(tiny_t5_encoder),
}
