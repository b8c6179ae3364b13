"""Byte-level BPE tokenizers built in code: every text round-trips, nothing is downloaded."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["CHATML", "tiny_tokenizer"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["the quick brown fox jumps over the lazy dog", "what is the capital of the country?", "it is the one"]
SPECIALS = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(
    *, bos: bool = False, eos: str | None = "<eos>", chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens.

    Args:
        bos: put `<bos>` before every text, as Llama's tokenizer does.
        eos: the end-of-sequence token, or None for a tokenizer without one.
        chat_template: a Jinja template.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    names = {"bos_token": "<bos>"} if bos else {}
    names |= {"eos_token": eos} if eos is not None else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **names)
    tokenizer.chat_template = chat_template
    return tokenizer
