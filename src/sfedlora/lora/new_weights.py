"""Weights that a checkpoint lacks: drawn again from the run's seed, and named so that they are trained and saved.

A fresh classification head or pooler is drawn per parameter, N(0, initializer_range) for weights, 0 for biases, 1 for
the scale of a norm, whatever the global generator holds. A checkpoint that lacks anything else is refused.

Not here: loading (`base_model`), how saved modules are matched (`targets`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sfedlora.errors import ModelError
from sfedlora.seeds import torch_generator

__all__ = ["classification_head", "draw_new_weights", "drawn_weight", "name_new_modules", "refuse_unusable"]

_DEFAULT_RANGE = 0.02


def classification_head(model: PreTrainedModel) -> str:
    """Name of the module that maps to the labels: the last top-level one with parameters outside the encoder.

    Raises:
        ModelError: the model has none.
    """
    encoder = model.base_model
    heads: list[str] = [
        name for name, child in model.named_children() if child is not encoder and any(True for _ in child.parameters())
    ]
    if encoder is model or not heads:
        raise ModelError(f"{type(model).__name__} has no classification head")
    return heads[-1]


def draw_new_weights(model: PreTrainedModel, parameters: Collection[str], seed: int) -> None:
    """Draw these parameters in place, as `drawn_weight`."""
    with torch.no_grad():
        for name in sorted(parameters):
            model.get_parameter(name).copy_(drawn_weight(model, name, seed))


def drawn_weight(model: PreTrainedModel, name: str, seed: int) -> Tensor:
    """The draw of a parameter, from `derive_seed(seed, "new_weight", name)`; the parameter itself is not read."""
    shape = model.get_parameter(name).shape
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    spread = float(model.config.to_dict().get("initializer_range") or _DEFAULT_RANGE)
    return torch.randn(shape, generator=torch_generator(seed, "new_weight", name)).mul_(spread)


def name_new_modules(
    model: PreTrainedModel, parameters: Collection[str], always: Sequence[str] = ()
) -> tuple[str, ...]:
    """The modules that hold these parameters, by names that fit PEFT's `modules_to_save`.

    A parameter outside the encoder stands for its whole top-level module; one inside for the largest module that is
    new altogether. Names are the shortest path suffixes that match no other module.

    Args:
        model: the loaded model.
        parameters: the parameters that were drawn.
        always: modules to name in any case (a classification head that the checkpoint has).

    Returns:
        Names in model order.
    """
    modules = dict(model.named_modules())
    paths = {_new_module(model, name, parameters) for name in parameters} | set(always)
    outermost = [path for path in modules if path in paths and not any(path.startswith(f"{p}.") for p in paths)]
    return tuple(_shortest_suffix(path, [other for other in modules if other != path]) for path in outermost)


def refuse_unusable(
    model: PreTrainedModel, missing: Collection[str], mismatched: Collection[str], *, head: str | None, source: str
) -> None:
    """Refuse a checkpoint that lacks more than a head or a pooler.

    Args:
        model: the loaded model.
        missing: parameters that the checkpoint lacks.
        mismatched: parameters whose shape in the checkpoint is another.
        head: the classification head, None for a causal language model.
        source: what the user gave.

    Raises:
        ModelError: another shape outside the head; missing weights in a transformer layer or an embedding; for a
            causal language model, any missing weight.
    """
    inside_head = f"{head}." if head else None
    outside = {name for name in mismatched if inside_head is None or not name.startswith(inside_head)}
    if outside:
        raise ModelError(f"{source}: the weights of {min(outside)} have another shape than config.json says")
    embeddings = _parameter_names(model, model.get_input_embeddings())
    lacking = sorted(
        name
        for name in missing
        if inside_head is None
        or (not name.startswith(inside_head) and (name in embeddings or any(p.isdigit() for p in name.split("."))))
    )
    if lacking:
        raise ModelError(
            f"{source}: the checkpoint lacks {len(lacking)} weights of {type(model).__name__}, for example "
            f"{lacking[0]}; it is incomplete or made for another architecture or task"
        )


def _new_module(model: PreTrainedModel, parameter: str, new: Collection[str]) -> str:
    encoder = _path_of(model, model.base_model)
    inside = encoder and parameter.startswith(f"{encoder}.")
    if not inside:
        return parameter.split(".", 1)[0]
    path = parameter.rpartition(".")[0]
    while (parent := path.rpartition(".")[0]) != encoder and all(
        f"{parent}.{name}" in new for name, _ in model.get_submodule(parent).named_parameters()
    ):
        path = parent
    return path


def _shortest_suffix(path: str, others: Sequence[str]) -> str:
    """PEFT matches by `endswith` on characters."""
    parts = path.split(".")
    suffixes = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
    return next((suffix for suffix in suffixes if not any(other.endswith(suffix) for other in others)), path)


def _path_of(model: nn.Module, module: nn.Module) -> str:
    paths: Iterator[str] = (path for path, candidate in model.named_modules() if candidate is module)
    return next(paths)


def _parameter_names(model: nn.Module, module: nn.Module) -> set[str]:
    path = _path_of(model, module)
    return {f"{path}.{name}" for name, _ in module.named_parameters()}
