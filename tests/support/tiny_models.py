"""Tiny random models of the supported families, built in code; every call with the same seed gives the same weights.

The sizes are awkward on purpose (grouped-query attention, odd vocabulary), and dropout probabilities are not zero, so
that a base which is not in eval mode shows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
)

__all__ = [
    "VOCAB_SIZE",
    "save_tiny_checkpoint",
    "tiny_bert_classifier",
    "tiny_deberta_classifier",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_llama_classifier",
    "tiny_opt",
    "tiny_qwen2",
    "tiny_roberta_classifier",
    "tiny_t5_encoder",
    "tiny_tokenizer",
]

VOCAB_SIZE = 67
_UNKNOWN = {"unk_token": "w3"}
_EDGES = {"bos_token": "<s>", "eos_token": "</s>"}
_LLAMA_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """Llama: 2 layers of 24, 4 heads on 2 key-value heads, tied embeddings."""
    return _build(LlamaForCausalLM, LlamaConfig(**_LLAMA_SHAPE, tie_word_embeddings=True), seed)


def tiny_llama_classifier(seed: int = 0, num_labels: int = 3) -> PreTrainedModel:
    """Llama with the linear head `score` on the last token."""
    return _build(LlamaForSequenceClassification, LlamaConfig(**_LLAMA_SHAPE, num_labels=num_labels), seed)


def tiny_qwen2(seed: int = 0) -> PreTrainedModel:
    """Qwen2: as the Llama, with biases on the query, key and value projections."""
    return _build(Qwen2ForCausalLM, Qwen2Config(**_LLAMA_SHAPE, tie_word_embeddings=False), seed)


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """GPT-2: transformers' `Conv1D` in place of linear modules."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _build(GPT2LMHeadModel, config, seed)


def tiny_opt(seed: int = 0) -> PreTrainedModel:
    """OPT: 2 decoder layers of 24."""
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _build(OPTForCausalLM, config, seed)


def tiny_bert_classifier(seed: int = 0, num_labels: int = 3) -> PreTrainedModel:
    """BERT with a pooler, dropout and the linear head `classifier`."""
    return _build(BertForSequenceClassification, BertConfig(**_BERT_SHAPE, num_labels=num_labels), seed)


def tiny_roberta_classifier(seed: int = 0, num_labels: int = 3) -> PreTrainedModel:
    """RoBERTa with the two-layer head `classifier`."""
    config = RobertaConfig(**{**_BERT_SHAPE, "pad_token_id": 1}, num_labels=num_labels)
    return _build(RobertaForSequenceClassification, config, seed)


def tiny_deberta_classifier(seed: int = 0, num_labels: int = 3) -> PreTrainedModel:
    """DeBERTa-v3: its attention projects position embeddings, which have no batch dimension, by the same modules."""
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    config = DebertaV2Config(
        **_BERT_SHAPE,
        **positions,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        num_labels=num_labels,
    )
    return _build(DebertaV2ForSequenceClassification, config, seed)


def tiny_t5_encoder(seed: int = 0) -> PreTrainedModel:
    """The encoder of T5."""
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2
    )
    return _build(T5EncoderModel, config, seed)


def tiny_tokenizer(*, pad_token: str | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `VOCAB_SIZE` words `w3`, `w4`, ...; without a padding token unless one is named."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCAB_SIZE))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, **_UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad_token, **_UNKNOWN, **_EDGES)


def save_tiny_checkpoint(model: PreTrainedModel, directory: Path, *, pad_token: str | None = None) -> Path:
    """Model and tokenizer as a checkpoint directory."""
    model.save_pretrained(directory)
    tiny_tokenizer(pad_token=pad_token).save_pretrained(directory)
    return directory


def _build(model_class: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()
