"""Prompt templates: how a prompt and a response become one text, and where the response ends.

    plain   prompt + newline + response + end of sequence
    alpaca  the instruction form of Stanford Alpaca without input + response + end of sequence
    chat    the tokenizer's own chat template, one user turn and one assistant turn, ended as the template ends it

Not here: truncation and labels (`encode`).

References:
    Taori et al., Stanford Alpaca: An Instruction-following LLaMA model, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from sfedlora.errors import DataError

__all__ = ["ResponseFrame", "Template", "bos_ids", "render_prompt", "render_prompts", "response_frame", "tokenize"]

Template = Literal["plain", "alpaca", "chat"]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
PLACEHOLDER = "RESPONSE-PLACEHOLDER"


@dataclass(frozen=True)
class ResponseFrame:
    """What a template puts around the response.

    Attributes:
        before: text between the rendered prompt and the response (empty for most templates).
        after: text that ends the assistant's turn.
        end_ids: token ids after that text (the end of sequence, where the text does not hold it).
    """

    before: str
    after: str
    end_ids: tuple[int, ...]


def render_prompt(prompt_text: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, as a model is trained to answer and should be asked: generation starts after the last.

    Raises:
        DataError: template `chat` for a tokenizer without a chat template.
    """
    return render_prompts([prompt_text], template, tokenizer)[0]


def render_prompts(prompts: Sequence[str], template: Template, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of many prompts; see `render_prompt`."""
    if template == "chat":
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return tokenize(_render_chat(conversations, tokenizer, add_generation_prompt=True), tokenizer)
    form = ALPACA if template == "alpaca" else "{prompt}\n"
    start = bos_ids(tokenizer)
    return [start + ids for ids in tokenize([form.replace("{prompt}", prompt) for prompt in prompts], tokenizer)]


def response_frame(template: Template, tokenizer: PreTrainedTokenizerBase) -> ResponseFrame:
    """What `template` puts around a response; found for `chat` by rendering a placeholder once.

    Raises:
        DataError: template `chat` for a tokenizer without a chat template, or one that hides the assistant's text.
    """
    eos = tokenizer.eos_token_id
    end_ids = () if eos is None else (eos,)
    if template != "chat":
        return ResponseFrame("", "", end_ids)
    asked = [{"role": "user", "content": "?"}]
    answered = [*asked, {"role": "assistant", "content": PLACEHOLDER}]
    prompt = _render_chat([asked], tokenizer, add_generation_prompt=True)[0]
    full = _render_chat([answered], tokenizer, add_generation_prompt=False)[0]
    if PLACEHOLDER not in full:
        raise DataError("template 'chat': the tokenizer's chat template leaves out the assistant's text; use 'plain'")
    head, _, after = full.rpartition(PLACEHOLDER)
    before = head.removeprefix(prompt) if head.startswith(prompt) else ""
    return ResponseFrame(before, after, () if after else end_ids)


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text by itself, without special tokens added."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-sequence id in a list where this tokenizer puts one before a text by itself, else an empty list."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [bos] if bos is not None and len(ids) > 1 and ids[0] == bos else []


def _render_chat(
    conversations: Sequence[Sequence[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> list[str]:
    if not tokenizer.chat_template:
        raise DataError("template 'chat': this tokenizer has no chat template; use template 'plain' or 'alpaca'")
    texts: list[str] = tokenizer.apply_chat_template(
        [list(conversation) for conversation in conversations],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return texts
