"""One client's optimizer over its flat buffers: one tensor per trained part, whatever the number of layers.

Not here: the training loop (`client`), the optimizer of the server (`server_optimizer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from sfedlora.errors import AdapterError
from sfedlora.lora.resident import ResidentModel
from sfedlora.types import Part, Tensors

__all__ = ["FlatOptimizer"]


class FlatOptimizer:
    """A torch optimizer of one slot of the resident model."""

    def __init__(
        self,
        resident: ResidentModel,
        slot: int,
        *,
        kind: Literal["adamw", "sgd"],
        learning_rates: Mapping[Part, float],
        weight_decay: float,
        max_grad_norm: float | None,
    ) -> None:
        """Begin with moments of zero; a learning rate for each part that is trained."""
        self._resident, self._slot = resident, slot
        self._params: dict[Part, nn.Parameter] = {}
        by_rate: dict[float, list[nn.Parameter]] = {}  # a group costs a call of its own
        for part in sorted(learning_rates):
            flat = resident.flat(part, slot)
            if flat.numel() == 0:
                continue
            param = nn.Parameter(flat, requires_grad=True)
            param.grad = resident.flat_grad(part, slot)
            by_rate.setdefault(learning_rates[part], []).append(param)
            self._params[part] = param
        groups = [{"params": params, "lr": rate} for rate, params in by_rate.items()]
        self._fused = kind == "adamw" and resident.device.type in {"cpu", "cuda"}
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=weight_decay, fused=self._fused)
            if kind == "adamw"
            else torch.optim.SGD(groups, weight_decay=weight_decay)
        )
        self._max_grad_norm = max_grad_norm

    def clip(self) -> float:
        """Clip the gradient and return its norm before; 0 without clipping. An infinite norm makes it zero or NaN."""
        if self._max_grad_norm is None:
            return 0.0
        return float(nn.utils.clip_grad_norm_(list(self._params.values()), self._max_grad_norm))

    def step(self) -> None:
        """Update the buffers in place."""
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The moments as `part/name` -> CPU tensor, laid out by the client's own rank, and step counts (scalars)."""
        return {
            f"{part.value}/{name}": (value if name == "step" else self._resident.cut_to_rank(part, value, self._slot))
            .detach()
            .to("cpu", copy=True)
            for part, param in self._params.items()
            for name, value in self._optimizer.state[param].items()
        }

    def restore(self, state: Tensors) -> None:
        """Take up moments that `state` gave; those of parts that are not trained are left out.

        Raises:
            AdapterError: one of another size, which the fused AdamW would read past its end.
        """
        for key, value in state.items():
            part, name = Part(key.split("/", 1)[0]), key.split("/", 1)[1]
            param = self._params.get(part)
            if param is None:
                continue
            if name == "step":
                on_cpu = not self._fused  # where torch itself keeps the step count
                self._optimizer.state[param][name] = value.to("cpu" if on_cpu else param.device, copy=True)
                continue
            try:
                self._optimizer.state[param][name] = self._resident.pad_to_rank(part, value, self._slot)
            except AdapterError as error:
                raise AdapterError(f"kept {key} has {error}") from None
