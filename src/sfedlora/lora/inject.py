"""The one resident model: a frozen base with LoRA pairs and a head that live in flat buffers.

`adapt` wraps the target modules and moves every trained tensor into one flat float32 buffer per part (A, B, head).
The model's parameters and their gradients are views of these buffers, so changing the client is a copy, a gradient
norm is one norm and an optimizer has one tensor per part.

Not here: the choice of modules (`targets`), the layer (`layer`), initial values of A (`methods`), files
(`peft_format`). After `adapt` A and B are zero and the head holds the model's own values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sfedlora.errors import AdapterError, ConfigError, ModelError
from sfedlora.lora.layer import DropoutState, LoraLinear, SeededDropout
from sfedlora.lora.targets import find_head_modules, find_targets, minimal_suffixes
from sfedlora.types import AdapterLayout, Part, Target, Tensors, part_of, path_of

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
    targets = find_targets(model, target_modules, head_paths=head_paths)
    _warn_about_rank(rank, targets)
    suffixes = minimal_suffixes(model, targets)
    model.requires_grad_(False)
    model.config.use_cache = False
    state = DropoutState()
    layers = {target.path: _wrap(model, target, rank, dropout, state) for target in targets}
    head = {f"{path}.{name}": p for path in head_paths for name, p in model.get_submodule(path).named_parameters()}
    if head_paths:
        _seed_head_dropout(model, state)
        _cast_around_head(model, head_paths)
    model.eval()
    layout = AdapterLayout(targets, {path: tuple(p.shape) for path, p in head.items()}, tuple(head_modules))
    return ResidentModel(model, layout, rank, layers=layers, dropout=state, target_suffixes=suffixes, device=device)


class ResidentModel:
    """Owner of the adapted model and of its flat buffers; made by `adapt`.

    Attributes:
        model: the adapted model; call it directly.
        layout: targets and head of the adapter.
        target_suffixes: the shortest list of path suffixes that names exactly the adapted modules.
        rank: the present rank.
        device: where the model and the buffers are.
        dropout: the seeds that all dropout layers read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: AdapterLayout,
        rank: int,
        *,
        layers: dict[str, LoraLinear],
        dropout: DropoutState,
        target_suffixes: tuple[str, ...],
        device: torch.device,
    ) -> None:
        """Move A, B and head into flat buffers. Use `adapt`, which prepares the arguments."""
        self.model = model
        self.layout = layout
        self.target_suffixes = target_suffixes
        self.rank = rank
        self.device = device
        self.dropout = dropout
        self._layers = layers
        self._flat: dict[Part, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._trained = frozenset(Part)
        self._scaling = 1.0
        self._allocate_factors()
        self._allocate_head()

    @property
    def scaling(self) -> float:
        """Gamma of every LoRA pair; set it to change all of them."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = float(value)
        for layer in self._layers.values():
            layer.scaling = self._scaling

    def flat(self, part: Part) -> Tensor:
        """The values of one part, (num_elements,), float32, laid out as `layout.shapes`; `.grad` is `flat_grad`.

        A tensor of length 0 where the model has no such part. Writing to it changes the model.
        """
        return self._flat[part]

    def flat_grad(self, part: Part) -> Tensor:
        """The gradients of one part, (num_elements,); backward adds to them in place."""
        gradient = self._flat[part].grad
        if gradient is None:
            raise ModelError(
                f"the gradient buffer of part {part.value!r} was removed; use zero_grad() of ResidentModel"
            )
        return gradient

    def zero_grad(self) -> None:
        """Set the gradients of every part to zero, in place."""
        for part in Part:
            self.flat_grad(part).zero_()

    def set_trained(self, parts: Iterable[Part]) -> None:
        """Let backward reach these parts only; the gradients of the others become zero and stay so."""
        self._trained = frozenset(parts)
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(part_of(name) in self._trained)
        for part in Part:
            if part not in self._trained:
                self.flat_grad(part).zero_()

    def load(self, tensors: Tensors) -> None:
        """Copy factors into the model; those not named keep their values.

        Args:
            tensors: any subset of the factors, floating point, on any device; not kept.

        Raises:
            AdapterError: an unknown factor, a wrong shape, or a dtype that is not floating point; nothing is copied.
        """
        for name, tensor in tensors.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                known = ", ".join(list(self._parameters)[:3])
                raise AdapterError(f"{name}: the adapted model has no such factor; it has {known}, ...")
            if tensor.shape != parameter.shape:
                raise AdapterError(
                    f"{name}: shape {tuple(tensor.shape)}; expected {tuple(parameter.shape)} (rank {self.rank})"
                )
            if not tensor.is_floating_point():
                raise AdapterError(f"{name}: dtype {tensor.dtype}; expected a floating-point dtype")
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._parameters[name].copy_(tensor)

    def read(self, parts: Iterable[Part] = tuple(Part)) -> dict[str, Tensor]:
        """Detached float32 copies on the CPU, named and ordered as `layout.shapes(rank, parts)`.

        The tensors of one part are disjoint views of one copy.
        """
        wanted = frozenset(parts)
        copies = {part: self._flat[part].to("cpu", copy=True) for part in wanted}
        views: dict[str, Tensor] = {}
        for part in (part for part in Part if part in wanted):
            views |= _split(copies[part], self.layout.shapes(self.rank, [part]))
        return views

    def resize(self, rank: int) -> None:
        """Give every pair another rank: A and B become zero, their buffers new (optimizers must be made again).

        Nothing happens if the rank is the present one. The head is untouched.

        Raises:
            ConfigError: a rank below 1.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"rank = {rank!r}; expected an integer of at least 1")
        if rank == self.rank:
            return
        _warn_about_rank(rank, self.layout.targets)
        self.rank = rank
        self._allocate_factors()
        self.set_trained(self._trained)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every transformer layer in the backward instead of keeping its activations.

        Transformers' own switch works in training mode only, which would turn on the dropout of the base.

        Raises:
            ModelError: a model without layers that support it.
        """
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(f"{type(self.model).__name__} has no layers that support gradient checkpointing")
        for layer in layers:
            if not isinstance(layer.forward, partial):
                layer.forward = partial(_checkpointed, layer.forward)

    def _allocate_factors(self) -> None:
        shapes_a, shapes_b = (self.layout.shapes(self.rank, [part]) for part in (Part.A, Part.B))
        self._flat[Part.A] = _flat_buffer(shapes_a, self.device)
        self._flat[Part.B] = _flat_buffer(shapes_b, self.device)
        views_a, views_b = _split(self._flat[Part.A], shapes_a), _split(self._flat[Part.B], shapes_b)
        for (name_a, a), (name_b, b) in zip(views_a.items(), views_b.items(), strict=True):
            layer = self._layers[path_of(name_a)]
            layer.set_factors(a, b)
            self._parameters |= {name_a: layer.a, name_b: layer.b}
        self._bind_gradients(Part.A)
        self._bind_gradients(Part.B)

    def _allocate_head(self) -> None:
        shapes = self.layout.shapes(self.rank, [Part.HEAD])
        self._flat[Part.HEAD] = _flat_buffer(shapes, self.device)
        for name, view in _split(self._flat[Part.HEAD], shapes).items():
            module, attribute = _owner(self.model, path_of(name))
            view.copy_(module.get_parameter(attribute).detach())
            parameter = nn.Parameter(view)
            setattr(module, attribute, parameter)
            self._parameters[name] = parameter
        self._bind_gradients(Part.HEAD)

    def _bind_gradients(self, part: Part) -> None:
        """Make views of the flat gradient the gradients of the parameters; backward then adds to them in place."""
        for name, gradient in _split(self.flat_grad(part), self.layout.shapes(self.rank, [part])).items():
            self._parameters[name].grad = gradient


def _flat_buffer(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Tensor:
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    flat = torch.zeros(size, dtype=torch.float32, device=device)
    flat.grad = torch.zeros_like(flat)
    return flat


def _split(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views of a flat tensor, one per factor."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    pieces = torch.split(flat, sizes) if sizes else ()
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _wrap(model: nn.Module, target: Target, rank: int, dropout: float, state: DropoutState) -> LoraLinear:
    module, attribute = _owner(model, target.path)
    a, b = torch.zeros(rank, target.in_features), torch.zeros(target.out_features, rank)
    layer = LoraLinear(model.get_submodule(target.path), a, b, dropout=dropout, dropout_state=state, path=target.path)
    setattr(module, attribute, layer)
    return layer


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path` (a module or a parameter), and the attribute's name."""
    parent, _, attribute = path.rpartition(".")
    return model.get_submodule(parent), attribute


def _seed_head_dropout(model: PreTrainedModel, state: DropoutState) -> None:
    """Replace `nn.Dropout` outside the base encoder; the encoder's own dropout stays off."""
    encoder = set(model.base_model.modules())
    found = [(path, module) for path, module in model.named_modules() if type(module) is nn.Dropout]
    for path, module in found:
        if module not in encoder:
            owner, attribute = _owner(model, path)
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


def _checkpointed(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def _single_device(model: PreTrainedModel) -> torch.device:
    devices: set[torch.device] = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ModelError(f"the model is spread over {sorted(map(str, devices))}; load it on one device")
    return devices.pop()


def _warn_about_rank(rank: int, targets: Sequence[Target]) -> None:
    """One warning where the rank exceeds what a delta weight can have."""
    tightest = min(targets, key=lambda target: min(target.in_features, target.out_features))
    limit = min(tightest.in_features, tightest.out_features)
    if rank > limit:
        warnings.warn(
            f"rank {rank} is above min(in_features, out_features) = {limit} of {tightest.path}; it costs more memory "
            "than the full weight and adds no expressiveness",
            UserWarning,
            stacklevel=3,
        )
