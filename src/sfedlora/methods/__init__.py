"""Federated LoRA methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from sfedlora.errors import ConfigError
from sfedlora.methods.base import Contribution as Contribution
from sfedlora.methods.base import Method as Method
from sfedlora.methods.base import aggregate as aggregate
from sfedlora.methods.base import check_update as check_update
from sfedlora.methods.base import client_weights as client_weights
from sfedlora.methods.centralized import Centralized as Centralized
from sfedlora.methods.fair import LoRAFAIR as LoRAFAIR
from sfedlora.methods.fedit import FedIT as FedIT
from sfedlora.methods.fedsa import FedSA as FedSA
from sfedlora.methods.ffa import FFA as FFA
from sfedlora.methods.flexlora import FlexLoRA as FlexLoRA
from sfedlora.methods.hetlora import HetLoRA as HetLoRA
from sfedlora.methods.local import Local as Local
from sfedlora.methods.rolora import RoLoRA as RoLoRA

__all__ = [
    "FFA",
    "METHODS",
    "Centralized",
    "Contribution",
    "FedIT",
    "FedSA",
    "FlexLoRA",
    "HetLoRA",
    "LoRAFAIR",
    "Local",
    "Method",
    "RoLoRA",
    "aggregate",
    "check_update",
    "client_weights",
    "make_method",
]

METHODS: Mapping[str, Callable[..., Method]] = MappingProxyType(
    {method.name: method for method in (FedSA, FedIT, FFA, RoLoRA, FlexLoRA, HetLoRA, LoRAFAIR, Local, Centralized)}
)
_FIXED_HEAD = {"local": "personal", "centralized": "shared"}


def make_method(name: str, head: Literal["auto", "personal", "shared"] = "auto") -> Method:
    """The method of a name, with its head personal or shared (`auto`: the method's own default).

    Raises:
        ConfigError: no such method, or a head placement that the method contradicts.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"method.name: unknown method {name!r};{hint} choose one of {', '.join(METHODS)}")
    fixed = _FIXED_HEAD.get(name)
    if fixed is not None and head not in ("auto", fixed):
        raise ConfigError(f"method.head: the head of method {name!r} is {fixed}, got {head!r}; leave it at auto")
    return METHODS[name]() if head == "auto" else METHODS[name](head=head)
