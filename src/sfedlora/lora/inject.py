"""Adapting a model: its target modules are wrapped, its head is prepared for training, everything else is frozen.

After `adapt` A and B are zero and the head holds the model's own values.

Not here: the choice of modules (`targets`), the layer (`layer`), the buffers that hold A, B and head (`resident`),
initial values of A (`methods`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sfedlora.errors import ConfigError, ModelError
from sfedlora.lora.layer import DropoutState, LoraLinear, SeededDropout
from sfedlora.lora.resident import ResidentModel, owner_of, warn_about_rank
from sfedlora.lora.targets import find_head_modules, find_layout, minimal_suffixes
from sfedlora.types import Target

__all__ = ["ResidentModel", "adapt"]


def adapt(
    model: PreTrainedModel,
    *,
    target_modules: str | Sequence[str],
    rank: int,
    dropout: float = 0.0,
    head_modules: Sequence[str] = (),
) -> ResidentModel:
    """Freeze a model and give it LoRA pairs and, where asked, a trained head. Changes the model in place.

    A head is trained in float32 whatever the dtype of the base: its inputs are cast to float32 on entry. A head module
    at the top level of the model (`classifier`, `score`) returns float32; one inside the encoder (`bert.pooler`)
    returns the encoder's dtype, because frozen modules may follow it.

    Args:
        model: the base model; it is put into eval mode, its parameters are frozen, its key-value cache is off.
        target_modules: "default", "all-linear", a regular expression or a list of suffixes; see `targets`.
        rank: rank of every pair.
        dropout: dropout on the LoRA inputs, in [0, 1).
        head_modules: modules trained in full, by PEFT's `modules_to_save` rules. With a head, `nn.Dropout` modules
            outside the base encoder become seeded ones.

    Returns:
        The owner of the adapted model, with every part trained and scaling 1.

    Raises:
        ModelError: target or head modules that do not fit the model, or a model spread over several devices.
        ConfigError: a rank or dropout outside its range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank = {rank!r}; expected an integer of at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout = {dropout}; expected a number in [0, 1)")
    device = _single_device(model)
    head_paths = find_head_modules(model, head_modules)
    layout = find_layout(model, target_modules, head_modules=head_modules)
    targets = layout.targets
    warn_about_rank(rank, targets)
    suffixes = minimal_suffixes(model, targets)
    model.requires_grad_(False)
    model.config.use_cache = False
    state = DropoutState()
    layers = {target.path: _wrap(model, target, rank, dropout, state) for target in targets}
    if head_paths:
        _seed_head_dropout(model, state)
        _cast_around_head(model, head_paths)
    model.eval()
    return ResidentModel(
        model,
        layout,
        rank,
        layers=layers,
        head_paths=head_paths,
        dropout=state,
        target_suffixes=suffixes,
        device=device,
    )


def _wrap(model: nn.Module, target: Target, rank: int, dropout: float, state: DropoutState) -> LoraLinear:
    module, attribute = owner_of(model, target.path)
    a, b = torch.zeros(rank, target.in_features), torch.zeros(target.out_features, rank)
    layer = LoraLinear(model.get_submodule(target.path), a, b, dropout=dropout, dropout_state=state, path=target.path)
    setattr(module, attribute, layer)
    return layer


def _seed_head_dropout(model: PreTrainedModel, state: DropoutState) -> None:
    """Replace `nn.Dropout` outside the base encoder; the encoder's own dropout stays off."""
    encoder = set(model.base_model.modules())
    found = [(path, module) for path, module in model.named_modules() if type(module) is nn.Dropout]
    for path, module in found:
        if module not in encoder:
            owner, attribute = owner_of(model, path)
            setattr(owner, attribute, SeededDropout(module.p, state, path))


def _cast_around_head(model: PreTrainedModel, head_paths: Sequence[str]) -> None:
    dtype = model.dtype
    if dtype == torch.float32:
        return
    encoder = set(model.base_model.modules())
    for path in head_paths:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, inputs: _cast(inputs, torch.float32))
        if module in encoder:
            module.register_forward_hook(lambda _, __, output: _cast(output, dtype))


def _cast(value: object, dtype: torch.dtype) -> object:
    """Floating-point tensors of a tensor or a tuple in another dtype; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def _single_device(model: PreTrainedModel) -> torch.device:
    devices: set[torch.device] = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ModelError(f"the model is spread over {sorted(map(str, devices))}; load it on one device")
    return devices.pop()
