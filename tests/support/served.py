"""What a run serves in the state of its last evaluation, through the library's own resident model.

The other side of a comparison with `support.stock`; nothing here judges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfedlora.experiment import load_state
from sfedlora.federation.state import FederationState, load_serving, serving_adapter
from sfedlora.lora.base_delta import select_deltas
from sfedlora.setup import Prepared

__all__ = ["Served"]


@dataclass(frozen=True)
class Served:
    """A run's federation and its state after the last round."""

    prepared: Prepared
    state: FederationState

    @classmethod
    def load(cls, run_dir: Path) -> Served:
        """Rebuild both from a run directory."""
        return cls(*load_state(run_dir))

    @torch.no_grad()
    def logits(self, client_id: str | None, inputs: list[list[int]]) -> list[Tensor]:
        """The logits of each example by itself, as a client (None: the shared part) serves them."""
        federation = self.prepared.federation
        if client_id is None:
            tensors = {**federation.initial, **self.state.server.shared}
            deltas = select_deltas(self.state.server.extra)
            federation.resident.serve(tensors, size=federation.sizes.server, base_deltas=deltas)
        else:
            load_serving(federation, self.state, [client_id])
        return [federation.resident.model(torch.tensor([ids])).logits[0] for ids in inputs]

    def factors(self, client_id: str) -> dict[str, Tensor]:
        """The complete adapter that a client serves."""
        return serving_adapter(self.prepared.federation, self.state, client_id)

    @property
    def delta_kinds(self) -> set[str]:
        """Which tensors hold the base deltas: `delta_left`, `fresh_full`, ..., of whatever round."""
        names = (name.partition(":")[0] for name in select_deltas(self.state.server.extra))
        return {re.sub(r"^delta\d+", "delta", name) for name in names}
