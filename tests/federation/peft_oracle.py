"""Local training as anybody would write it with stock PEFT and torch.optim: the oracle of `federation.client`.

Imports nothing of sfedlora. Batches are given as lists of (tokens, label) examples; padding, shifting and the mean over
labels are written out again here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

__all__ = ["Example", "PlainLoop", "Trained", "batch_nll", "wrap"]


@dataclass(frozen=True)
class Example:
    """Token ids, and either the position of the first labelled token or a class."""

    tokens: Sequence[int]
    label: int


@dataclass
class Trained:
    """What a loop leaves: factors by module path, head parameters by name, and what was seen on the way."""

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    first_norms: tuple[float, float] = (0.0, 0.0)
    mean_loss: float = 0.0


def wrap(
    model: PreTrainedModel,
    targets: Sequence[str],
    *,
    rank: int,
    scaling: float,
    start: Mapping[str, Tensor],
    head_modules: Sequence[str] = (),
) -> PeftModel:
    """A PEFT model in eval mode with the factors `a:path`, `b:path`, `head:parameter` of `start`."""
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,
        target_modules=list(targets),
        modules_to_save=list(head_modules) or None,
        task_type="SEQ_CLS" if head_modules else "CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for kind, path, parameter in _adapters(wrapped):
            parameter.copy_(start[f"{kind}:{path}"])
    return wrapped


def batch_nll(model: nn.Module, batch: Sequence[Example], *, classify: bool, pad: int) -> tuple[Tensor, int]:
    """Summed negative log-likelihood and number of labels of one padded batch."""
    width = max(len(example.tokens) for example in batch)
    ids = torch.tensor([[*example.tokens, *[pad] * (width - len(example.tokens))] for example in batch])
    mask = torch.tensor([[1] * len(example.tokens) + [0] * (width - len(example.tokens)) for example in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits
    logs = log_softmax(logits, -1)
    if classify:
        return -logs[range(len(batch)), [example.label for example in batch]].sum(), len(batch)
    where = [(row, place) for row, one in enumerate(batch) for place in range(one.label, len(one.tokens))]
    rows, before = [row for row, _ in where], [place - 1 for _, place in where]
    return -logs[rows, before, [batch[row].tokens[place] for row, place in where]].sum(), len(where)


class PlainLoop:
    """One client's model with one optimizer that may live for several rounds."""

    def __init__(
        self,
        model: PeftModel,
        optimizer: str,
        *,
        learning_rate: float,
        a_ratio: float = 1.0,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        train_a: bool = True,
        classify: bool = False,
        pad: int = 0,
        proximal_mu: float = 0.0,
        anchored: Sequence[str] = (),
    ) -> None:
        found = _adapters(model)
        self.model, self.max_grad_norm, self.classify, self.pad = model, max_grad_norm, classify, pad
        self.a = {path: parameter.requires_grad_(train_a) for kind, path, parameter in found if kind == "a"}
        self.b = {path: parameter for kind, path, parameter in found if kind == "b"}
        self.head = {path: parameter for kind, path, parameter in found if kind == "head"}
        groups = [{"params": [*self.b.values(), *self.head.values()], "lr": learning_rate}]
        if train_a:
            groups.append({"params": list(self.a.values()), "lr": learning_rate * a_ratio})
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = make(groups, weight_decay=weight_decay)
        self.proximal_mu = proximal_mu
        self.anchors = [(parameter, parameter.detach().clone()) for kind, _, parameter in found if kind in anchored]
        self.trained = [*self.b.values(), *self.head.values(), *(self.a.values() if train_a else ())]

    def run(self, steps: Sequence[Sequence[Sequence[Example]]]) -> Trained:
        """Optimizer steps, each over some micro-batches; the loss is the mean over all their labels."""
        result = Trained()
        total, labels = 0.0, 0
        for number, micro_batches in enumerate(steps):
            self.optimizer.zero_grad()
            sums = [batch_nll(self.model, batch, classify=self.classify, pad=self.pad) for batch in micro_batches]
            count = sum(item[1] for item in sums)
            summed = torch.stack([item[0] for item in sums]).sum()
            (summed / count).backward()  # type: ignore[no-untyped-call]
            total, labels = total + float(summed.detach()), labels + count
            if number == 0:
                result.first_norms = (_norm(self.a.values()), _norm(self.b.values()))
            if self.proximal_mu and self.anchors:
                squares = [(parameter - anchor).square().sum() for parameter, anchor in self.anchors]
                (self.proximal_mu / 2 * torch.stack(squares).sum()).backward()  # type: ignore[no-untyped-call]
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
            self.optimizer.step()
        for ours, theirs in ((result.a, self.a), (result.b, self.b), (result.head, self.head)):
            ours.update({path: parameter.detach().clone() for path, parameter in theirs.items()})
        result.mean_loss = total / labels
        return result


def _norm(parameters: Iterable[Tensor]) -> float:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


def _adapters(model: PeftModel) -> list[tuple[str, str, nn.Parameter]]:
    found = []
    for name, parameter in model.named_parameters():
        path = name.removeprefix("base_model.model.")
        if ".lora_A.default." in path:
            found.append(("a", path.split(".lora_A.")[0], parameter))
        elif ".lora_B.default." in path:
            found.append(("b", path.split(".lora_B.")[0], parameter))
        elif ".modules_to_save.default." in path:
            found.append(("head", path.replace(".modules_to_save.default.", "."), parameter))
    return found
