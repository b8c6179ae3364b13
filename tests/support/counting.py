"""Counts what does not depend on the clock: operators, and bytes that copies write."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountOperators"]


class CountOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and bytes that copies write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = {}
        self.copied_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        result = func(*args, **(kwargs or {}))
        if name in {"copy_", "_to_copy", "clone", "cat"}:
            self.copied_bytes += result.numel() * result.element_size()
        return result
