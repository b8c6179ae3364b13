"""One LoRA pair around one frozen linear module, and dropout whose masks come from seeds.

    h = base(x) + scaling * (x A^T) B^T         A: (rank, in_features), B: (out_features, rank)

`LoraLinear` holds the frozen module (`nn.Linear`, transformers' `Conv1D`, 8- and 4-bit linears) and calls it; it looks
at its weight only to merge a base delta that has become a whole matrix, and only where that weight is float32. It
carries one client's pair, or a stack of C pairs that serve a batch made of C equal groups.

Not here: which modules are wrapped and where A and B live in memory (`inject`), gamma (`scaling`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sfedlora.errors import AdapterError, ModelError
from sfedlora.lora.base_delta import BaseDelta
from sfedlora.seeds import torch_generator

__all__ = ["DropoutState", "LoraLinear", "SeededDropout", "StackedHead", "linear_features", "seeded_dropout"]

_NOT_LINEAR = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


@dataclass
class DropoutState:
    """The seeds that every dropout layer of one model draws from; the only mutable value of this package.

    Attributes:
        seeds: one seed per client of the stack (one seed for a single client), or None for no dropout. Whoever trains
            sets it before every forward, from (client, round, step, micro-batch), and leaves it unchanged until the
            backward has ended; gradient checkpointing draws the same masks again.
        own_shapes: (rows, tokens) of each client's own batch inside a stack that pads them to common ones; None where
            nothing is padded.
        padded_shape: (rows, tokens) of every client's share of the batch; (0, 0) where nobody said.
    """

    seeds: tuple[int, ...] | None = None
    own_shapes: tuple[tuple[int, int], ...] | None = None
    padded_shape: tuple[int, int] = (0, 0)

    def clear(self) -> None:
        """No dropout, no known shapes."""
        self.seeds, self.own_shapes, self.padded_shape = None, None, (0, 0)


class LoraLinear(nn.Module):
    """A frozen linear module with a LoRA pair beside it.

    The order of operations and the dtype rules are stock PEFT's: x is cast to the dtype of A, the sum is cast back to
    the dtype of the base output. A stack computes C clients at once with `bmm`; row block c of the leading (batch)
    dimension of x belongs to client c, and all blocks have the same size.

    Attributes:
        base: the frozen module, always in eval mode.
        a: (rank, in_features), or (C, rank, in_features) for a stack.
        b: (out_features, rank), or (C, out_features, rank) for a stack.
        scaling: gamma; a float, or for a stack optionally a tensor of shape (C,).
    """

    a: nn.Parameter
    b: nn.Parameter
    base: nn.Module

    def __init__(
        self,
        base: nn.Module,
        a: Tensor,
        b: Tensor,
        *,
        scaling: float | Tensor = 1.0,
        dropout: float = 0.0,
        dropout_state: DropoutState | None = None,
        path: str = "",
    ) -> None:
        """Wrap `base`.

        Args:
            base: a linear module; it is frozen here.
            a: initial A, not copied.
            b: initial B, not copied.
            scaling: gamma.
            dropout: probability of dropping an element of the LoRA input, in [0, 1).
            dropout_state: where the seeds of its masks are read; None for no dropout.
            path: address of this module's masks, its path in the model.

        Raises:
            ModelError: `base` is not a linear module.
            AdapterError: A and B do not fit the module or each other.
        """
        super().__init__()
        features = linear_features(base)
        if features is None:
            raise ModelError(f"{path or 'module'} is a {type(base).__name__}; LoRA can only wrap linear modules")
        self.in_features, self.out_features = features
        self.base = base.requires_grad_(False).eval()
        self.scaling = scaling
        self.dropout = dropout
        self.dropout_state = DropoutState() if dropout_state is None else dropout_state
        self.path = path
        self._delta: BaseDelta | None = None
        self._merged_weight: Tensor | None = None
        self.set_factors(a, b)

    def set_delta(self, delta: BaseDelta | None) -> None:
        """Correct the frozen weight by a base delta, or by none; the base module itself is not changed.

        Factors are applied beside the base, and so is a whole matrix, except where the base weight is float32: there
        the sum of both, computed once, takes the base's place.

        Args:
            delta: on the device of the module, not copied.

        Raises:
            AdapterError: the delta does not fit the module.
        """
        if delta is not None:
            self.require_fitting(delta)
        self._delta, self._merged_weight = delta, None
        if delta is None or delta.right is not None:
            return
        if self.weight.dtype == torch.float32 and type(self.base) in {nn.Linear, Conv1D}:
            weight = self.weight.T if isinstance(self.base, Conv1D) else self.weight
            self._merged_weight = weight.detach() + delta.left

    def require_fitting(self, delta: BaseDelta) -> None:
        """Refuse a base delta of another shape than the module's weight.

        Raises:
            AdapterError: the delta does not fit the module.
        """
        in_features = delta.left.shape[1] if delta.right is None else delta.right.shape[1]
        if (delta.left.shape[0], in_features) != (self.out_features, self.in_features):
            raise AdapterError(
                f"{self.path}: a base delta ({delta.left.shape[0]}, {in_features}); expected "
                f"({self.out_features}, {self.in_features})"
            )

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Use other tensors for A and B, not copied: another rank, another number of stacked clients.

        Raises:
            AdapterError: A and B do not fit the module or each other.
        """
        stack, rank = tuple(a.shape[:-2]), a.shape[-2] if a.ndim in {2, 3} else 0
        expected_a, expected_b = (*stack, rank, self.in_features), (*stack, self.out_features, rank)
        if rank < 1 or tuple(a.shape) != expected_a or tuple(b.shape) != expected_b:
            raise AdapterError(
                f"{self.path or 'LoRA pair'}: A {tuple(a.shape)} and B {tuple(b.shape)}; expected (rank, "
                f"{self.in_features}) and ({self.out_features}, rank), both with the same number of clients in front "
                "for a stack"
            )
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)

    @property
    def weight(self) -> Tensor:
        """The base weight: some models (T5's feed-forward) look at its dtype."""
        weight = self.base.weight
        if not isinstance(weight, Tensor):
            raise ModelError(f"{self.path}: the base module {type(self.base).__name__} has no weight tensor")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias, where there is one."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def train(self, mode: bool = True) -> LoraLinear:
        """Set the flag of this module; the frozen base stays in eval mode."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Apply the frozen module and the LoRA pair.

        Args:
            x: (batch, ..., in_features); for a stack of C clients batch is a multiple of C.

        Returns:
            (batch, ..., out_features) in the dtype of the base output.
        """
        if self._merged_weight is not None:
            result = functional.linear(x, self._merged_weight, self.bias)
        else:
            result = self.base(x)
        dtype = result.dtype
        x = x.to(self.a.dtype)
        if self._delta is not None and self._merged_weight is None:
            if self.a.ndim == 2 and not torch.is_grad_enabled() and self.dropout_state.seeds is None:
                return (result + self._joined_delta(x, self._delta)).to(dtype)
            result = result + self._base_correction(x, self._delta)
        if self.dropout > 0 and self.dropout_state.seeds is not None:
            x = _dropout_of(self.dropout_state, x, self.dropout, self.path)
        if self.a.ndim == 2:
            delta = functional.linear(functional.linear(x, self.a), self.b) * self.scaling
        else:
            delta = self._stacked_delta(x)
        return (result + delta).to(dtype)

    def _joined_delta(self, x: Tensor, delta: BaseDelta) -> Tensor:
        """Pair and base delta summed in the order of the one pair that they are exported as (`adapter_with_deltas`).

            [x A^T, x right^T] [scaling * B, left]^T

        Stock PEFT then gives the same bits. Another order differs in the last bit of float32, which now and then flips
        a rounding to bfloat16; in a deep model that grows to several of its steps in the logits. Training does not
        join: it would keep a copy of the delta for backward.
        """
        b = self.b * self.scaling
        if delta.right is not None:
            hidden = functional.linear(x, torch.cat([self.a, delta.right]))
        elif self.in_features > self.out_features:
            return functional.linear(functional.linear(x, self.a), b) + functional.linear(x, delta.left)
        else:
            hidden = torch.cat([functional.linear(x, self.a), x], dim=-1)
        return functional.linear(hidden, torch.cat([b, delta.left], dim=1))

    def _base_correction(self, x: Tensor, delta: BaseDelta) -> Tensor:
        if delta.right is None:
            return functional.linear(x, delta.left)
        return functional.linear(functional.linear(x, delta.right), delta.left)

    def _stacked_delta(self, x: Tensor) -> Tensor:
        """Each client's share of the rows with its own pair.

        Raises:
            AdapterError: the rows are not those of a whole batch, so nobody knows whose they are.
        """
        num_clients, scaling = self.a.shape[0], self.scaling
        rows, tokens = self.dropout_state.padded_shape
        of_a_batch = x.shape[0] in {num_clients * rows, num_clients * rows * tokens} or rows == 0
        if x.shape[0] % num_clients or not of_a_batch:
            raise AdapterError(
                f"{self.path}: a batch of {x.shape[0]} rows for a stack of {num_clients} clients"
                + ("" if of_a_batch else f" with {rows} x {tokens} tokens each; this model needs runner: serial")
            )
        shares = x.reshape(num_clients, -1, self.in_features)
        delta = torch.bmm(torch.bmm(shares, self.a.transpose(1, 2)), self.b.transpose(1, 2))
        scaling = scaling.view(-1, 1, 1) if isinstance(scaling, Tensor) else scaling
        return (delta * scaling).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, scaling={self.scaling}"


class SeededDropout(nn.Module):
    """Takes the place of an `nn.Dropout` in a trained head; active while its `DropoutState` holds seeds.

    Attributes:
        slot: which client of the batch it sees alone, inside a copy of a `StackedHead`; None if it sees all.
    """

    def __init__(self, p: float, state: DropoutState, path: str) -> None:
        """Remember probability, seeds and address; nothing is drawn here."""
        super().__init__()
        self.p = p
        self.state = state
        self.path = path
        self.slot: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x, (batch, ...); the shape and dtype stay."""
        if self.state.seeds is None or self.p == 0:
            return x
        return _dropout_of(self.state, x, self.p, self.path, self.slot)


class StackedHead(nn.Module):
    """Copies of a head module, one per client of a stack; each sees the rows of its client.

    Attributes:
        copies: the modules.
        active: the copies whose clients the next batch is made of.
    """

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        """Hold the copies, not copied again; all of them active."""
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self.activate(0, len(copies))

    def activate(self, start: int, stop: int) -> None:
        """Say that the next batches are made of the clients `start` to `stop - 1`."""
        self.active = slice(start, stop)
        for place, copied in enumerate(self.copies[self.active]):
            for module in copied.modules():
                if isinstance(module, SeededDropout):
                    module.slot = place

    def forward(self, x: Tensor) -> Tensor:
        """Apply each active copy to its share of x, (batch, ...), batch being a multiple of their number."""
        active = self.copies[self.active]
        if x.shape[0] % len(active):
            raise AdapterError(f"a head: a batch of {x.shape[0]} rows for a stack of {len(active)} clients")
        shares = x.chunk(len(active))
        return torch.cat([copy(share) for copy, share in zip(active, shares, strict=True)])


def seeded_dropout(
    x: Tensor,
    p: float,
    seeds: tuple[int, ...],
    path: str,
    *,
    own_shapes: tuple[tuple[int, int], ...] | None = None,
    padded_shape: tuple[int, int] = (0, 0),
) -> Tensor:
    """Inverted dropout whose masks depend on the seeds, the address and each client's own shape only.

    Masks are drawn on the CPU from `derive_seed(seed, "dropout", path)`, one per client, and then moved, so every
    device sees the same ones. A module that is called several times in one forward draws the same mask each time.

    Args:
        x: (batch, ...), batch being `len(seeds)` equal groups.
        p: probability of an element to be dropped, in [0, 1).
        seeds: one seed per group.
        path: address of the layer.
        own_shapes: (rows, tokens) of each group without its padding; None where nothing is padded.
        padded_shape: (rows, tokens) of every group.

    Returns:
        x with dropped elements at 0 and the others divided by 1 - p.

    Raises:
        AdapterError: the batch does not divide into `len(seeds)` groups.
    """
    if x.shape[0] % len(seeds):
        raise AdapterError(f"{path}: a batch of {x.shape[0]} rows for {len(seeds)} dropout seeds")
    shape = (x.shape[0] // len(seeds), *x.shape[1:])
    shapes = own_shapes or (padded_shape,) * len(seeds)
    masks = [
        _mask(shape, padded_shape, own, p, torch_generator(seed, "dropout", path))
        for seed, own in zip(seeds, shapes, strict=True)
    ]
    kept = (masks[0] if len(masks) == 1 else torch.cat(masks)).to(x.device)
    return x * kept.to(x.dtype).div_(1 - p)


def _dropout_of(state: DropoutState, x: Tensor, p: float, path: str, slot: int | None = None) -> Tensor:
    """`seeded_dropout` with what the state says now, for all clients of a stack or for the one in a slot."""
    seeds, shapes = state.seeds or (), state.own_shapes
    if slot is not None:
        seeds, shapes = (seeds[slot],), None if shapes is None else (shapes[slot],)
    return seeded_dropout(x, p, seeds, path, own_shapes=shapes, padded_shape=state.padded_shape)


def _mask(
    shape: tuple[int, ...],
    padded: tuple[int, int],
    own: tuple[int, int],
    p: float,
    generator: torch.Generator,
) -> Tensor:
    """What one client keeps of its share of x: drawn as if its batch stood alone, kept where it is padding.

    Args:
        shape: of the share: (rows, tokens, ...), (rows * tokens, ...) or (rows, ...).
        padded: (rows, tokens) of the share.
        own: (rows, tokens) of the client's own batch.
        p: probability of an element to be dropped.
        generator: of the client and layer.
    """
    if own == padded:
        return torch.rand(shape, generator=generator) >= p
    rows, tokens = padded
    apart = len(shape) > 2 and shape[:2] == padded  # (rows, features) may look like (rows, tokens)
    if apart or shape[0] == rows * tokens:
        features = shape[2:] if apart else shape[1:]
        kept = torch.ones(rows, tokens, *features, dtype=torch.bool)
        kept[: own[0], : own[1]] = torch.rand(own[0], own[1], *features, generator=generator) >= p
    else:
        kept = torch.ones(shape, dtype=torch.bool)
        kept[: own[0]] = torch.rand(own[0], *shape[1:], generator=generator) >= p
    return kept.reshape(shape)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a module that LoRA can wrap, None for any other.

    `nn.Linear` and its subclasses (bitsandbytes' 8- and 4-bit linears are), transformers' `Conv1D`, and the other
    quantised linears that PEFT knows.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, _NOT_LINEAR):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's way to say that it does not know the type
        try:
            in_features, out_features = _get_in_out_features(module)
        except (UserWarning, ValueError, AttributeError):
            return None
    return None if in_features is None or out_features is None else (in_features, out_features)
