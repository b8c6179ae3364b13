"""Cross-entropy of a causal language model at its labelled positions, without the logits of any other position.

    inputs -> trunk, once, all positions -> labelled rows -> the rest of the model, a chunk of rows at a time

The trunk is the model inside the model, everything below the output head. What the model's own `forward` does with its
output (norms, output head, soft cap, logit scale) is done by that `forward`: it is called with a trunk that hands back
labelled rows. So no architecture is described here; that code must treat every row alike, as it does in all causal
language models of transformers.

Not here: what a batch is and how losses are summed (`objective`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sfedlora.data.encoded import IGNORED_LABEL
from sfedlora.errors import AdapterError, ModelError
from sfedlora.lora.layer import LoraLinear

__all__ = ["behind_trunk", "label_losses"]

Head = Callable[[Tensor], Tensor]
"""(groups, rows, width) hidden states -> (groups, rows, vocabulary) logits."""

# Logits of one chunk. On a CPU 32 MiB of float32: the allocator still reuses such blocks, and 64 to 256 rows of a
# vocabulary of 49k measured the same. On a GPU 256 MiB, enough rows to keep it busy with a vocabulary of 152k.
_CPU_LOGITS, _GPU_LOGITS = 2**23, 2**26


def label_losses(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor, *, chunk_rows: int | None = None
) -> Tensor:
    """The loss of every labelled token; logits are computed for these only and never all held.

    With gradients enabled and a frozen output head, the gradient of the labelled rows is computed together with their
    losses; with a trained output head every chunk is computed a second time in backward. A LoRA pair on the output
    head that draws dropout masks gets all its rows at once, because masks must not depend on the chunks.

    Args:
        model: stock or adapted; nothing is left on it, whatever is raised.
        inputs: arguments of its forward, `input_ids` (batch, length) among them, on its device.
        labels: (batch, length) token ids, unshifted, -100 where there is no label; nothing predicts the first column.
            On the CPU no device has to be waited for.
        chunk_rows: most rows whose logits exist at a time, at least 1; None takes what suits vocabulary and device.

    Returns:
        (batch, length - 1) float32: the cross-entropy, in nats, of the tokens at positions 1, 2, ...; 0 without label.

    Raises:
        ModelError: a model whose forward cannot be divided into a trunk and the rest.
        AdapterError: the output head carries the pairs of C clients and the batch is no multiple of C.
    """
    inner, outside = _divided(model)
    if not inner:
        raise ModelError(f"{type(model).__name__} holds no inner model below its output head; expected a causal-lm")
    output = inner[0](**inputs, use_cache=False)
    hidden: Tensor = output.last_hidden_state

    def head(rows: Tensor) -> Tensor:
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        with _returning(inner, type(output)(last_hidden_state=rows), type(model).__name__):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    pairs = [module for module in outside if isinstance(module, LoraLinear)]
    places = _labelled_places(labels, max((len(pair.a) for pair in pairs if pair.a.ndim == 3), default=1))
    index = places.to(hidden.device)
    predicting = (index - 1).clamp_(min=0).flatten()
    rows = hidden.flatten(0, 1).index_select(0, predicting).view(*index.shape, hidden.shape[-1])
    targets = labels.to(hidden.device).flatten()[index].clamp(min=0)
    step = places.shape[1] if any(map(_draws_masks, pairs)) else _chunk_size(model, chunk_rows, hidden) // len(places)
    trained = any(p.requires_grad for module in outside for p in module.parameters(recurse=False))
    losses = _row_losses(head, rows, targets, max(step, 1), trained=trained)
    table = losses.new_zeros(labels.numel()).scatter(0, index.flatten(), losses.flatten())
    return table.view(labels.shape)[:, 1:]


def behind_trunk(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Those of some module paths that `label_losses` gives labelled rows instead of whole sequences."""
    inner, outside = _divided(model)
    return [path for path in paths if inner and model.get_submodule(path) in outside]


def _divided(model: PreTrainedModel) -> tuple[list[PreTrainedModel], list[nn.Module]]:
    """The models inside a model, of which the first is the trunk, and the modules outside the trunk.

    In the order of `model.modules()`, without its names, which take longer than all the rest.
    """
    inner: list[PreTrainedModel] = []
    outside: list[nn.Module] = []
    seen: set[nn.Module] = set()
    waiting: list[tuple[nn.Module | None, bool]] = [(model, False)]
    while waiting:
        module, is_inside = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, PreTrainedModel) and module is not model:
            is_inside = is_inside or not inner
            inner.append(module)
        if not is_inside:
            outside.append(module)
        waiting += [(child, is_inside) for child in reversed(module._modules.values())]
    return inner, outside


def _labelled_places(labels: Tensor, num_groups: int) -> Tensor:
    """(groups, rows) flat places of the labelled tokens; short groups are filled with 0, whose loss nobody reads."""
    if len(labels) % num_groups:
        raise AdapterError(f"a batch of {len(labels)} examples for a stack of {num_groups} clients on the output head")
    groups = (labels != IGNORED_LABEL).view(num_groups, -1)
    places = [group.nonzero()[:, 0] + number * groups.shape[1] for number, group in enumerate(groups)]
    return pad_sequence(places, batch_first=True)


def _draws_masks(pair: LoraLinear) -> bool:
    return pair.dropout > 0 and pair.dropout_state.seeds is not None


def _chunk_size(model: PreTrainedModel, chunk_rows: int | None, hidden: Tensor) -> int:
    if chunk_rows is not None:
        return chunk_rows
    logits = _CPU_LOGITS if hidden.device.type == "cpu" else _GPU_LOGITS
    return logits // int(model.config.get_text_config().vocab_size)


@contextmanager
def _returning(inner: Sequence[nn.Module], output: object, name: str) -> Iterator[None]:
    """While active, every inner model returns `output` whatever it is called with.

    Raises:
        ModelError: none of them was called.
    """
    calls = 0

    def give(*_: object, **__: object) -> object:
        nonlocal calls
        calls += 1
        return output

    replaced = [(module, module.__dict__.get("forward")) for module in inner]
    try:
        for module in inner:
            module.__dict__["forward"] = give
        yield
    finally:
        for module, own in replaced:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
    if not calls:
        raise ModelError(f"{name} does not call the models inside it; its output head cannot be computed on its own")


def _row_losses(head: Head, rows: Tensor, targets: Tensor, step: int, *, trained: bool) -> Tensor:
    """(groups, rows) float32 losses, from chunks of `step` rows of every group."""
    if torch.is_grad_enabled() and not trained and rows.requires_grad:
        losses: Tensor = _LossesOfFrozenHead.apply(rows, targets, head, step)  # type: ignore[no-untyped-call]
        return losses

    def cross_entropy(chunk: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(head(chunk).float().flatten(0, 1), wanted.flatten(), reduction="none")

    chunks = zip(torch.split(rows, step, dim=1), torch.split(targets, step, dim=1), strict=True)
    if torch.is_grad_enabled() and trained:
        parts = [checkpoint(cross_entropy, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        parts = [cross_entropy(*chunk) for chunk in chunks]
    return torch.cat([part.view(len(rows), -1) for part in parts], dim=1)


class _LossesOfFrozenHead(torch.autograd.Function):
    """Losses of rows, and their gradient computed at once: a row's loss depends on no other row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, head: Head, step: int) -> Tensor:
        losses = torch.empty(targets.shape, device=rows.device)
        gradients = torch.empty_like(rows)
        for start in range(0, rows.shape[1], step):
            part = (slice(None), slice(start, start + step))
            wanted = targets[part].unsqueeze(-1)
            with torch.enable_grad():
                chunk = rows[part].detach().requires_grad_()
                logits = head(chunk)
            log_probs = functional.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
            losses[part] = -log_probs.gather(-1, wanted).squeeze(-1)
            by_logit = log_probs.exp_().scatter_add_(-1, wanted, torch.full(wanted.shape, -1.0, device=rows.device))
            (gradients[part],) = torch.autograd.grad(logits, chunk, by_logit.to(logits.dtype))
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients.float() * by_loss.unsqueeze(-1)).to(gradients.dtype), None, None, None
