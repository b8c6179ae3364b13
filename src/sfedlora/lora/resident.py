"""The owner of the adapted model: A, B and head live in flat buffers, one per part.

The model's parameters and their gradients are views of these buffers, so changing the client is a copy, a gradient
norm is one norm and an optimizer has one tensor per part.

Not here: how a model is adapted (`inject`), the layer (`layer`), files (`peft_format`).
"""

from __future__ import annotations

import copy
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
from sfedlora.lora.layer import DropoutState, LoraLinear, StackedHead
from sfedlora.types import AdapterLayout, LoraSize, Part, Target, Tensors, factor_name, part_of, path_of

__all__ = ["ResidentModel", "owner_of", "warn_about_rank"]

MAX_KEPT_VIEWS = 32
"""Runs of slots whose views are kept; a view per layer and run is made anew otherwise."""


class ResidentModel:
    """Owner of the adapted model and of its flat buffers; made by `adapt`.

    It carries the adapter of one client, or a stack of C adapters for a batch made of C equal groups of rows. The
    adapter of slot c is a flat buffer per part, whatever C is, so an optimizer or a norm of one client never sees that
    there are others. A batch may also belong to some neighbouring slots only (`set_active`); with one slot the model
    computes what it computes without a stack.

    Attributes:
        model: the adapted model; call it directly.
        layout: targets and head of the adapter.
        target_suffixes: the shortest list of path suffixes that names exactly the adapted modules.
        rank: the present rank; in a stack the largest, the others are padded with zeros, which training leaves zero.
        num_clients: C.
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
        head_paths: Sequence[str],
        dropout: DropoutState,
        target_suffixes: tuple[str, ...],
        device: torch.device,
    ) -> None:
        """Move A, B and head into flat buffers. Use `adapt`, which prepares the arguments."""
        self.model = model
        self.layout = layout
        self.target_suffixes = target_suffixes
        self.rank = rank
        self.num_clients = 1
        self.device = device
        self.dropout = dropout
        self._layers = layers
        self._heads = {path: model.get_submodule(path) for path in head_paths}
        self._flat: dict[Part, list[Tensor]] = {}
        self._buffers: dict[Part, tuple[Tensor, Tensor]] = {}
        self._values: list[dict[str, Tensor]] = [{}]
        self._head_parameters: list[nn.Parameter] = []
        self._pairs: dict[tuple[int, int], list[tuple[nn.Parameter, nn.Parameter]]] = {}
        self._trained = frozenset(Part)
        self._scalings = [1.0]
        self._ranks = [rank]
        self._active = (0, 1)
        self._base_deltas: Tensors = {}
        self._allocate_factors()
        self._allocate_head({name: self._head_value(name) for name in self.layout.shapes(rank, [Part.HEAD])})

    @property
    def scaling(self) -> float:
        """Gamma of every LoRA pair, of the first slot; set it to change all of them, in all slots."""
        return self._scalings[0]

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._set_scalings([float(value)] * self.num_clients)

    def flat(self, part: Part, slot: int = 0) -> Tensor:
        """The values of one part of one client, (num_elements,), float32, laid out as `layout.shapes`.

        Its `.grad` is `flat_grad`. A tensor of length 0 where the model has no such part. Writing to it changes the
        model.
        """
        return self._flat[part][slot]

    def flat_grad(self, part: Part, slot: int = 0) -> Tensor:
        """The gradients of one part of one client, (num_elements,); backward adds to them in place."""
        gradient = self._flat[part][slot].grad
        if gradient is None:
            raise ModelError(
                f"the gradient buffer of part {part.value!r} was removed; use zero_grad() of ResidentModel"
            )
        return gradient

    def zero_grad(self) -> None:
        """Set the gradients of every part to zero, in place."""
        for part in Part:
            self.flat_grad(part)  # still there?
            self._buffers[part][1].zero_()

    def set_trained(self, parts: Iterable[Part]) -> None:
        """Let backward reach these parts only; the gradients of the others become zero and stay so."""
        self._trained = frozenset(parts)
        pairs = [pair for pairs in self._pairs.values() for pair in pairs]
        for a, b in pairs:
            a.requires_grad_(Part.A in self._trained)
            b.requires_grad_(Part.B in self._trained)
        for parameter in self._head_parameters:
            parameter.requires_grad_(Part.HEAD in self._trained)
        for part in frozenset(Part) - self._trained:
            self._buffers[part][1].zero_()

    def set_active(self, start: int, stop: int) -> None:
        """Say that the next batches belong to the slots `start` to `stop - 1` of the stack only."""
        if (start, stop) == self._active:
            return
        self._active = (start, stop)
        for layer, (a, b) in zip(self._layers.values(), self._pairs_of(start, stop), strict=True):
            layer.a, layer.b = a, b
        self._apply_scalings()
        for path in self._heads:
            head = self.model.get_submodule(path)
            if isinstance(head, StackedHead):
                head.activate(start, stop)

    def load(self, tensors: Tensors, slot: int = 0) -> None:
        """Copy factors into the model; those not named keep their values.

        Args:
            tensors: any subset of the factors, floating point, on any device; not kept.
            slot: the client of the stack.

        Raises:
            AdapterError: an unknown factor, a wrong shape, or a dtype that is not floating point; nothing is copied.
        """
        rank, values = self._ranks[slot], self._values[slot]
        shapes = self.layout.shapes(rank)
        for name, tensor in tensors.items():
            if name not in shapes:
                known = ", ".join(list(shapes)[:3])
                raise AdapterError(f"{name}: the adapted model has no such factor; it has {known}, ...")
            if tuple(tensor.shape) != shapes[name]:
                raise AdapterError(f"{name}: shape {tuple(tensor.shape)}; expected {shapes[name]} (rank {rank})")
            if not tensor.is_floating_point():
                raise AdapterError(f"{name}: dtype {tensor.dtype}; expected a floating-point dtype")
        with torch.no_grad():
            for name, tensor in tensors.items():
                _of_rank(name, values[name], rank).copy_(tensor)

    def serve(self, tensors: Tensors, *, size: LoraSize, base_deltas: Tensors) -> None:
        """Become the model of one client: its rank, gamma and factors on the frozen weights with their corrections.

        Raises:
            AdapterError: as `load` and `set_base_deltas`.
        """
        self.serve_stack([tensors], sizes=[size], base_deltas=base_deltas)

    def serve_stack(self, adapters: Sequence[Tensors], *, sizes: Sequence[LoraSize], base_deltas: Tensors) -> None:
        """Become the model of several clients at once, in the order given; all of them active.

        Raises:
            AdapterError: as `load` and `set_base_deltas`.
        """
        self.resize(max(size.rank for size in sizes), num_clients=len(adapters))
        self._ranks = [size.rank for size in sizes]
        self.set_base_deltas(base_deltas)
        for slot, tensors in enumerate(adapters):
            if self._ranks[slot] < self.rank:
                self.flat(Part.A, slot).zero_()
                self.flat(Part.B, slot).zero_()
            self.load(tensors, slot)
        self.set_active(0, len(adapters))
        self._set_scalings([size.scaling for size in sizes])

    def set_base_deltas(self, tensors: Tensors) -> None:
        """Correct the frozen weights by base deltas; an empty mapping takes all corrections back.

        Nothing is computed if these very tensors are in use already.

        Args:
            tensors: delta tensors by their names in `ServerState.extra` (`base_delta`), not copied.

        Raises:
            AdapterError: a delta of a module that is not adapted, or of another shape; those before stay in use.
        """
        same_names = tensors.keys() == self._base_deltas.keys()
        if same_names and all(self._base_deltas[name] is tensor for name, tensor in tensors.items()):
            return
        deltas = {path: _moved(delta, self.device) for path, delta in total_deltas(tensors).items()}
        unknown = sorted(deltas.keys() - self._layers.keys())
        if unknown:
            raise AdapterError(f"{unknown[0]}: a base delta of a module that is not adapted")
        for path, delta in deltas.items():
            self._layers[path].require_fitting(delta)
        for path, layer in self._layers.items():
            layer.set_delta(deltas.get(path))
        self._base_deltas = dict(tensors)

    def read(self, parts: Iterable[Part] = tuple(Part), slot: int = 0) -> dict[str, Tensor]:
        """Detached float32 copies on the CPU, named and ordered as `layout.shapes(rank, parts)`.

        The tensors of one part are disjoint views of one copy.
        """
        wanted, rank = frozenset(parts), self._ranks[slot]
        views: dict[str, Tensor] = {}
        for part in (part for part in Part if part in wanted):
            flat = self._flat[part][slot]
            own = self.cut_to_rank(part, flat, slot)
            views |= _split(own.to("cpu", copy=own is flat), self.layout.shapes(rank, [part]))
        return views

    def cut_to_rank(self, part: Part, flat: Tensor, slot: int) -> Tensor:
        """A tensor like `flat(part, slot)`, laid out by the client's own rank; itself if that is the same."""
        rank = self._ranks[slot]
        if rank == self.rank or part is Part.HEAD:
            return flat
        pieces = _split(flat, self._shapes(part))
        return torch.cat([_of_rank(name, piece, rank).flatten() for name, piece in pieces.items()])

    def pad_to_rank(self, part: Part, flat: Tensor, slot: int) -> Tensor:
        """The inverse of `cut_to_rank`, on the device of the model; the rest is zero. Always a copy.

        Raises:
            AdapterError: not as many elements as the client's factors have.
        """
        rank = self._ranks[slot]
        shapes = self.layout.shapes(rank, [part])
        num_elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        if tuple(flat.shape) != (num_elements,):
            raise AdapterError(f"shape {tuple(flat.shape)}, expected ({num_elements},)")
        padded = torch.zeros_like(self.flat(part, slot))
        views = _split(padded, self._shapes(part))
        for name, own in _split(flat, shapes).items():
            _of_rank(name, views[name], rank).copy_(own)
        return padded

    def resize(self, rank: int, *, num_clients: int = 1) -> None:
        """Give every pair another rank, and the model another number of clients.

        A and B become zero, their buffers new (optimizers must be made again); in a stack the head is that of the
        former first slot for all. Nothing happens if both numbers are the present ones.

        Raises:
            ConfigError: a rank or a number of clients below 1.
        """
        for name, number in (("rank", rank), ("num_clients", num_clients)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{name} = {number!r}; expected an integer of at least 1")
        if (rank, num_clients) == (self.rank, self.num_clients) and self._ranks:
            self._ranks = [rank] * num_clients
            return
        if rank > self.rank:
            warn_about_rank(rank, self.layout.targets)
        head = {name: value.clone() for name, value in self._values[0].items() if part_of(name) is Part.HEAD}
        other_clients = num_clients != self.num_clients or not self._ranks
        self._ranks = []  # should the memory not suffice, the next call begins anew
        self.rank, self.num_clients = rank, num_clients
        self._scalings = [self.scaling] * num_clients
        self._allocate_factors()
        if other_clients:
            self._allocate_head(head)
        self.set_trained(self._trained)
        self._ranks = [rank] * num_clients

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every transformer layer in the backward instead of keeping its activations.

        Transformers' own switch works in training mode only, which would turn on the dropout of the base.

        Raises:
            ModelError: a model without layers that support it.
        """
        for layer in self._transformer_layers("gradient checkpointing"):
            if not isinstance(layer.forward, partial):
                layer.forward = partial(_checkpointed, layer.forward)

    def compile_layers(self) -> None:
        """Compile every transformer layer when it is first called; sizes of batches may change from call to call.

        Layers of like structure share what is compiled. Output head and loss are not compiled.

        Raises:
            ModelError: a model whose transformer layers are not known.
        """
        for layer in self._transformer_layers("compilation"):
            layer.compile(dynamic=True)

    def _transformer_layers(self, purpose: str) -> list[nn.Module]:
        layers: list[nn.Module] = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(f"{type(self.model).__name__} has no layers that support {purpose}")
        return layers

    def _allocate_factors(self) -> None:
        """New buffers for A and B; the parameters of a layer are views of them, over all slots."""
        heads = [{name: v for name, v in own.items() if part_of(name) is Part.HEAD} for own in self._values]
        heads = (heads * self.num_clients)[: self.num_clients]
        self._pairs = {}
        for part in (Part.A, Part.B):
            self._new_buffer(part)
        self._values = [
            {
                **_split(self.flat(Part.A, slot), self._shapes(Part.A)),
                **_split(self.flat(Part.B, slot), self._shapes(Part.B)),
                **head,
            }
            for slot, head in enumerate(heads)
        ]
        self._active = (0, 0)
        self.set_active(0, self.num_clients)

    def _pairs_of(self, start: int, stop: int) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A and B of every layer over some slots: views of the buffers, and so are their gradients."""
        if (start, stop) in self._pairs:
            return self._pairs[start, stop]
        if len(self._pairs) >= MAX_KEPT_VIEWS:
            self._pairs = {}
        views: dict[str, nn.Parameter] = {}
        for part in (Part.A, Part.B):
            values, gradients = (_split_stack(buffer[start:stop], self._shapes(part)) for buffer in self._buffers[part])
            for name, value in values.items():
                views[name] = nn.Parameter(value, requires_grad=part in self._trained)
                views[name].grad = gradients[name]
        pairs = [(views[factor_name(Part.A, path)], views[factor_name(Part.B, path)]) for path in self._layers]
        self._pairs[start, stop] = pairs
        return pairs

    def _set_scalings(self, scalings: list[float]) -> None:
        self._scalings = scalings
        self._apply_scalings()

    def _apply_scalings(self) -> None:
        """Gamma of the active slots: a number where they have one, else one for each."""
        active = self._scalings[slice(*self._active)]
        scaling = active[0] if len(set(active)) == 1 else torch.tensor(active, device=self.device)
        for layer in self._layers.values():
            layer.scaling = scaling

    def _allocate_head(self, values: Tensors) -> None:
        """A new buffer for the head, the same values in every slot; a stack has a copy of each head module per slot."""
        self._new_buffer(Part.HEAD)
        for path, original in self._heads.items():
            owner, attribute = owner_of(self.model, path)
            copies = _copies(original, self.num_clients, self.dropout)
            setattr(owner, attribute, original if self.num_clients == 1 else StackedHead(copies))
        self._head_parameters = []
        shapes = self._shapes(Part.HEAD)
        for slot in range(self.num_clients):
            gradients = _split(self.flat_grad(Part.HEAD, slot), shapes)
            for name, view in _split(self.flat(Part.HEAD, slot), shapes).items():
                view.copy_(values[name])
                parameter = nn.Parameter(view)
                parameter.grad = gradients[name]
                module, attribute = self._head_owner(name, slot)
                setattr(module, attribute, parameter)
                self._values[slot][name] = view
                self._head_parameters.append(parameter)

    def _head_owner(self, name: str, slot: int) -> tuple[nn.Module, str]:
        """The module that holds a head parameter in one slot, and the attribute's name."""
        path = path_of(name)
        root = next(root for root in self._heads if path.startswith(f"{root}."))
        head = self.model.get_submodule(root)
        own = head.copies[slot] if isinstance(head, StackedHead) else head
        return owner_of(own, path.removeprefix(f"{root}."))

    def _head_value(self, name: str) -> Tensor:
        module, attribute = self._head_owner(name, 0)
        return module.get_parameter(attribute).detach()

    def _shapes(self, part: Part) -> dict[str, tuple[int, ...]]:
        return self.layout.shapes(self.rank, [part])

    def _new_buffer(self, part: Part) -> None:
        """Values and gradients, (C, num_elements) zeros; their rows become the flat tensors of the slots."""
        size = sum(torch.Size(shape).numel() for shape in self._shapes(part).values())
        buffer = torch.zeros(self.num_clients, size, dtype=torch.float32, device=self.device)
        gradient = torch.zeros_like(buffer)
        self._buffers[part] = (buffer, gradient)
        self._flat[part] = list(buffer.unbind())
        for row, row_gradient in zip(self._flat[part], gradient.unbind(), strict=True):
            row.grad = row_gradient


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


def _split(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views of a flat tensor, one per factor."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    pieces = torch.split(flat, sizes) if sizes else ()
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _split_stack(buffer: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views of a buffer (C, num_elements), one per factor: (C, ...), or without C where it is 1."""
    if len(buffer) == 1:
        return _split(buffer[0], shapes)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    pieces = torch.split(buffer, sizes, dim=1) if sizes else ()
    return {name: piece.view(len(buffer), *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _of_rank(name: str, tensor: Tensor, rank: int) -> Tensor:
    """The first rows of A or columns of B; any other factor whole."""
    if part_of(name) is Part.A:
        return tensor[:rank]
    return tensor[:, :rank] if part_of(name) is Part.B else tensor


def _copies(module: nn.Module, num_copies: int, state: DropoutState) -> list[nn.Module]:
    """Copies of a head module; their dropout layers read the same seeds."""
    if num_copies == 1:
        return [module]
    return [copy.deepcopy(module, {id(state): state}) for _ in range(num_copies)]


def _checkpointed(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)
