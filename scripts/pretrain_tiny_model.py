"""Make the committed tiny model and its federated chat data: `src/sfedlora/assets/{tiny_llama,tiny_chat.jsonl}`.

    pip install --no-deps chatterbot-corpus==1.3.3 chitchat-dataset==0.9.0
    python scripts/pretrain_tiny_model.py

A Llama of 2 layers x 64 with a byte-level BPE of 1,024 is pretrained on small talk (chitchat-dataset) and on
some topics of chatterbot-corpus. Whole other topics are held out: eight equal clients are cut from them, so that LoRA
has something left to learn. One thread and fixed seeds: a second run on the same machine and library versions gives
the same bytes. Takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sfedlora.sources import local_path

ASSETS = Path(__file__).parents[1] / "src" / "sfedlora" / "assets"
HELD_OUT = ("ai", "conversations", "emotion", "psychology", "trivia")
# Clients of the federated data: topic -> number of shards cut from it in file order (neighbours are alike).
SHARDS = {"ai": 1, "conversations": 1, "emotion": 3, "psychology": 1, "trivia": 2}
PAIRS_PER_CLIENT = 60
MAX_CHARACTERS = 160  # of prompt and response together in the federated data: keeps test steps short
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    """One prompt and its reply.

    Attributes:
        prompt: what is said.
        response: what is answered.
        topic: the corpus file, or the shard of it, that the pair comes from.
    """

    prompt: str
    response: str
    topic: str


def read_topic(path: Path) -> list[Pair]:
    """The distinct pairs of consecutive turns in one corpus file, in file order."""
    conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    turns = [(str(one).strip(), str(two).strip()) for talk in conversations for one, two in pairwise(talk)]
    return [Pair(one, two, path.stem) for one, two in dict.fromkeys(turns) if one and two]


def read_dialogues(path: Path, num_pairs: int) -> list[Pair]:
    """Distinct pairs of consecutive turns, short ones, spread evenly over the dialogues of chitchat-dataset."""
    dialogues = json.loads(path.read_text(encoding="utf-8")).values()
    pairs: dict[tuple[str, str], None] = {}
    for dialogue in dialogues:
        turns = [" ".join(message["text"].strip() for message in turn) for turn in dialogue["messages"]]
        pairs |= dict.fromkeys((one, two) for one, two in pairwise(turns) if one and two)
    short = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= MAX_CHARACTERS]
    stride = max(1, len(short) // num_pairs)
    return [Pair(one, two, "chitchat") for one, two in short[::stride][:num_pairs]]


def cut_clients(topics: dict[str, list[Pair]]) -> list[Pair]:
    """Equal clients from the held-out topics; a topic of several shards is named `topic-1`, `topic-2`, ..."""
    rows: list[Pair] = []
    for topic, num_shards in SHARDS.items():
        short = [pair for pair in topics[topic] if len(pair.prompt) + len(pair.response) <= MAX_CHARACTERS]
        if len(short) < num_shards * PAIRS_PER_CLIENT:
            raise SystemExit(f"{topic}: {len(short)} short pairs, needed {num_shards * PAIRS_PER_CLIENT}")
        for shard in range(num_shards):
            name = topic if num_shards == 1 else f"{topic}-{shard + 1}"
            chosen = short[shard * PAIRS_PER_CLIENT : (shard + 1) * PAIRS_PER_CLIENT]
            rows += [Pair(pair.prompt, pair.response, name) for pair in chosen]
    return rows


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the chat template; every text can be encoded, none gives an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106 - a vocabulary entry, not a secret
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 164,160 parameters (embeddings tied), drawn from the current seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[list[int]]:
    """Token ids of each pair in the chat template, cut at 256."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}], tokenize=False
        )
        for pair in pairs
    ]
    return list(tokenizer(texts, add_special_tokens=False, truncation=True, max_length=256)["input_ids"])


def collate(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Pad rows to the longest: `input_ids`, `attention_mask`, `labels` (-100 at padding), each (batch, length)."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: Sequence[list[int]]) -> float:
    """Mean loss per predicted token in nats."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        chunk = rows[start : start + 32]
        tokens = sum(len(row) - 1 for row in chunk)
        total += model(**collate(chunk)).loss.item() * tokens
        count += tokens
    return total / count


def pretrain(model: LlamaForCausalLM, rows: Sequence[list[int]], *, epochs: int, seed: int) -> None:
    """AdamW with a cosine schedule, 16 texts of like length per step, loss on every token."""
    order = random.Random(seed)  # noqa: S311 - not for secrets
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = [by_length[start : start + 16] for start in range(0, len(rows), 16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.1, betas=(0.9, 0.98))
    total_steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    )
    model.train()
    for _ in range(epochs):
        order.shuffle(batches)
        for batch in batches:
            loss = model(**collate([rows[index] for index in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def write_chat(path: Path, pairs: Sequence[Pair]) -> None:
    """One JSON object per line: prompt, response, topic."""
    lines = (
        json.dumps({"prompt": pair.prompt, "response": pair.response, "topic": pair.topic}, ensure_ascii=False)
        for pair in pairs
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def package_path(source: str) -> Path:
    """The path of `package:NAME/path`."""
    path = local_path(source)
    if path is None:
        raise SystemExit(f"{source}: expected package:NAME/path")
    return path


def main() -> None:
    """Read the corpus, pretrain, save, and print the losses before and after."""
    parser = argparse.ArgumentParser(description="Make the tiny model and its federated chat data.")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--num-dialogue-pairs", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    folder = package_path("package:chatterbot_corpus/data/english")
    topics = {path.stem: read_topic(path) for path in sorted(folder.glob("*.yml"))}
    seen = [pair for topic, pairs in topics.items() if topic not in HELD_OUT for pair in pairs]
    seen += read_dialogues(package_path("package:chitchat_dataset/dataset.json"), options.num_dialogue_pairs)
    clients = cut_clients(topics)

    tokenizer = train_tokenizer([text for pair in seen for text in (pair.prompt, pair.response)])
    model = build_model(tokenizer).eval()
    train_rows, held_out_rows = encode(tokenizer, seen), encode(tokenizer, clients)
    print(f"pretraining pairs {len(seen)}, tokens {sum(map(len, train_rows))}; held-out pairs {len(clients)}, ", end="")
    print(f"tokens {sum(map(len, held_out_rows))}; parameters {model.num_parameters()}")
    print(f"before: train {mean_loss(model, train_rows):.3f}, held out {mean_loss(model, held_out_rows):.3f}")
    pretrain(model, train_rows, epochs=options.epochs, seed=options.seed)
    print(f"after:  train {mean_loss(model, train_rows):.3f}, held out {mean_loss(model, held_out_rows):.3f}")

    model.save_pretrained(options.out / "tiny_llama")
    tokenizer.save_pretrained(options.out / "tiny_llama")
    write_chat(options.out / "tiny_chat.jsonl", clients)


if __name__ == "__main__":
    main()
