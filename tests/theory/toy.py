"""A linear model inside the real code: token -> frozen random vector -> one adapted linear layer -> logits.

The federation on it is the library's own (`form_initial_a`, `run_rounds`, the serial runner, SGD of the client,
`aggregate`); only the model is so small that hundreds of federations run in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sfedlora.data.encoded import EncodedData
from sfedlora.data.partition import ClientSplit
from sfedlora.federation.client import LocalTraining, TrainingSetup
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.initialize import Initialization, form_initial_a
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.state import Federation, RoundSettings
from sfedlora.lora.inject import adapt
from sfedlora.lora.scaling import ScalingRule, scaling_factor
from sfedlora.methods import client_weights, make_method
from sfedlora.types import LoraSize, LoraSizes, Part

__all__ = ["SIZE", "LinearModel", "LinearModelConfig", "linear_federation"]

SIZE = 32
EXAMPLES_PER_CLIENT = 16
VOCABULARY = 512


class LinearModelConfig(PreTrainedConfig):  # type: ignore[misc] # transformers is untyped here
    model_type = "sfedlora_linear_toy"

    def __init__(self, size: int = SIZE, vocab_size: int = VOCABULARY, **kwargs: object) -> None:
        self.size = size
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class LinearModel(PreTrainedModel):  # type: ignore[misc] # transformers is untyped here
    """logits = W0 x + delta x, with x a fixed random vector per token and W0 = 0."""

    config_class = LinearModelConfig

    def __init__(self, config: LinearModelConfig) -> None:
        super().__init__(config)
        self.vectors = nn.Embedding(config.vocab_size, config.size)
        self.linear = nn.Linear(config.size, config.size, bias=False)
        self.post_init()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.vectors.weight.copy_(torch.randn(config.vocab_size, config.size, generator=generator))
            self.linear.weight.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        del attention_mask
        return SequenceClassifierOutput(logits=self.linear(self.vectors(input_ids[:, 0])))


@dataclass(frozen=True)
class _Task:
    """Examples of all clients: every client has its own teacher around a common one; client i is the same for any N."""

    data: EncodedData
    splits: Mapping[str, ClientSplit]


def _draw_task(model: LinearModel, num_clients: int, seed: int) -> _Task:
    vectors = model.vectors.weight.detach().numpy()
    common = np.random.default_rng([seed, 0]).standard_normal((SIZE, SIZE))
    tokens, labels, splits = [], [], {}
    for client in range(num_clients):
        rng = np.random.default_rng([seed, 1, client])
        own = rng.integers(0, VOCABULARY, EXAMPLES_PER_CLIENT)
        teacher = common + 0.3 * rng.standard_normal((SIZE, SIZE))
        tokens.append(own)
        labels.append((vectors[own] @ teacher.T).argmax(1))
        rows = tuple(range(client * EXAMPLES_PER_CLIENT, (client + 1) * EXAMPLES_PER_CLIENT))
        splits[f"{client:03d}"] = ClientSplit(rows, rows, rows)
    count = num_clients * EXAMPLES_PER_CLIENT
    data = EncodedData(np.concatenate(tokens).astype(np.int32), np.arange(count + 1), labels=np.concatenate(labels))
    return _Task(data, splits)


def linear_federation(
    rule: ScalingRule,
    init: Initialization,
    num_clients: int,
    rank: int,
    *,
    count: Literal["effective", "total"] = "effective",
    shares: Sequence[int] | None = None,
    alpha: float = 4.0,
    learning_rate: float = 0.01,
    num_rounds: int = 2,
    seed: int = 0,
) -> Federation:
    """FedSA with SGD, five full-batch local steps, on the linear model.

    Args:
        rule: scaling rule.
        init: how A is drawn.
        num_clients: N.
        rank: r.
        count: what stands for N in `sfed`: the effective count of the average that formed A, or N.
        shares: how often each client holds its examples, and so its weight in every average; once if not given.
        alpha: of the scaling rule.
        learning_rate: of SGD, for A and B.
        num_rounds: rounds.
        seed: of task and draws.
    """
    model = LinearModel(LinearModelConfig())
    task = _draw_task(model, num_clients, seed)
    resident = adapt(model, target_modules=("linear",), rank=rank)
    repeats = dict(zip(task.splits, [1] * num_clients if shares is None else shares, strict=True))
    rows = {client: split.train * repeats[client] for client, split in task.splits.items()}
    weights = client_weights({client: len(own) for client, own in rows.items()}, "examples")
    initial = form_initial_a(resident.layout, rank, weights=weights, init=init, seed=seed)
    effective = initial.effective_clients if count == "effective" else float(num_clients)
    training = LocalTraining("sgd", 1.0, 0.0, 10**6, 1, 5, None, None, keep_optimizer_state=False)
    return Federation(
        resident=resident,
        runner=SerialRunner(TrainingSetup(resident, task.data, training, "sequence-classification", 0, seed)),
        method=make_method("fedsa"),
        data=task.data,
        splits=task.splits,
        participants=rows,
        external={},
        initial={**resident.read([Part.B]), **initial.tensors},
        init=init,
        sizes=LoraSizes(LoraSize(rank, scaling_factor(rule, alpha=alpha, rank=rank, num_clients=effective))),
        effective_clients=initial.effective_clients,
        task="sequence-classification",
        pad_token_id=0,
        batching=EvalBatching(EXAMPLES_PER_CLIENT, 10**6),
        rounds=RoundSettings(num_rounds, None, "examples", learning_rate, "constant", 0, num_rounds, "all"),
        seed=seed,
    )
