"""The owner of the adapted model: A, B and head live in flat buffers, one per part.

The model's parameters and their gradients are views of these buffers, so changing the client is a copy, a gradient
norm is one norm and an optimizer has one tensor per part.

Not here: how a model is adapted (`inject`), the layer (`layer`), files (`peft_format`).
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
from sfedlora.lora.base_delta import BaseDelta, total_deltas
from sfedlora.lora.layer import DropoutState, LoraLinear
from sfedlora.types import AdapterLayout, LoraSize, Part, Target, Tensors, part_of, path_of

__all__ = ["ResidentModel", "owner_of", "warn_about_rank"]


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
        self._base_deltas: Tensors = {}
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

    def serve(self, tensors: Tensors, *, size: LoraSize, base_deltas: Tensors) -> None:
        """Become the model of one client: its rank, gamma and factors on the frozen weights with their corrections.

        Raises:
            AdapterError: as `load` and `set_base_deltas`.
        """
        self.resize(size.rank)
        self.set_base_deltas(base_deltas)
        self.load(tensors)
        self.scaling = size.scaling

    def set_base_deltas(self, tensors: Tensors) -> None:
        """Correct the frozen weights by base deltas; an empty mapping takes all corrections back.

        Nothing is computed if these very tensors are in use already.

        Args:
            tensors: delta tensors by their names in `ServerState.extra` (`base_delta`), not copied.

        Raises:
            AdapterError: a delta of a module that is not adapted, or of another shape.
        """
        if tensors.keys() == self._base_deltas.keys() and all(
            self._base_deltas[name] is tensors[name] for name in tensors
        ):
            return
        deltas = {path: _moved(delta, self.device) for path, delta in total_deltas(tensors).items()}
        unknown = sorted(deltas.keys() - self._layers.keys())
        if unknown:
            raise AdapterError(f"{unknown[0]}: a base delta of a module that is not adapted")
        for path, layer in self._layers.items():
            layer.set_delta(deltas.get(path))
        self._base_deltas = dict(tensors)

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
        warn_about_rank(rank, self.layout.targets)
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
            module, attribute = owner_of(self.model, path_of(name))
            view.copy_(module.get_parameter(attribute).detach())
            parameter = nn.Parameter(view)
            setattr(module, attribute, parameter)
            self._parameters[name] = parameter
        self._bind_gradients(Part.HEAD)

    def _bind_gradients(self, part: Part) -> None:
        """Make views of the flat gradient the gradients of the parameters; backward then adds to them in place."""
        for name, gradient in _split(self.flat_grad(part), self.layout.shapes(self.rank, [part])).items():
            self._parameters[name].grad = gradient


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path` (a module or a parameter), and the attribute's name."""
    parent, _, attribute = path.rpartition(".")
    return model.get_submodule(parent), attribute


def warn_about_rank(rank: int, targets: Sequence[Target]) -> None:
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


def _moved(delta: BaseDelta, device: torch.device) -> BaseDelta:
    """A base delta in float32 on a device."""
    right = None if delta.right is None else delta.right.to(device, torch.float32)
    return BaseDelta(delta.left.to(device, torch.float32), right)


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


def _checkpointed(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)
