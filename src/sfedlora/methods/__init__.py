"""Federated LoRA methods by name.

A method outside this package is named `module:Class`. The module is imported as Python does, from what is installed and
from PYTHONPATH; nothing is looked for beside the configuration or in the working directory.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from sfedlora.errors import ConfigError
from sfedlora.methods.aggregation import aggregate as aggregate
from sfedlora.methods.aggregation import broadcast_tensors as broadcast_tensors
from sfedlora.methods.aggregation import check_update as check_update
from sfedlora.methods.aggregation import check_updates as check_updates
from sfedlora.methods.aggregation import client_factors as client_factors
from sfedlora.methods.aggregation import client_weights as client_weights
from sfedlora.methods.base import Contribution as Contribution
from sfedlora.methods.base import Method as Method
from sfedlora.methods.base import Traits as Traits
from sfedlora.methods.centralized import Centralized as Centralized
from sfedlora.methods.fair import LoRAFAIR as LoRAFAIR
from sfedlora.methods.fedex import FedEx as FedEx
from sfedlora.methods.fedit import FedIT as FedIT
from sfedlora.methods.fedsa import FedSA as FedSA
from sfedlora.methods.ffa import FFA as FFA
from sfedlora.methods.flexlora import FlexLoRA as FlexLoRA
from sfedlora.methods.flora import FLoRA as FLoRA
from sfedlora.methods.hetlora import HetLoRA as HetLoRA
from sfedlora.methods.local import Local as Local
from sfedlora.methods.rolora import RoLoRA as RoLoRA
from sfedlora.types import Part

__all__ = [
    "FFA",
    "METHODS",
    "Centralized",
    "Contribution",
    "FLoRA",
    "FedEx",
    "FedIT",
    "FedSA",
    "FlexLoRA",
    "HetLoRA",
    "LoRAFAIR",
    "Local",
    "Method",
    "RoLoRA",
    "Traits",
    "aggregate",
    "broadcast_tensors",
    "check_update",
    "check_updates",
    "client_factors",
    "client_weights",
    "find_method",
    "make_method",
]

METHODS: Mapping[str, Callable[..., Method]] = MappingProxyType(
    {
        method.name: method
        for method in (FedSA, FedIT, FFA, RoLoRA, FLoRA, FedEx, FlexLoRA, HetLoRA, LoRAFAIR, Local, Centralized)
    }
)
_MEMBERS = (
    "name",
    "traits",
    "trained_parts",
    "shared_parts",
    "broadcast_parts",
    "personal_parts",
    "server_step",
)


def find_method(name: str) -> Callable[..., Method]:
    """The class of a name: one of `METHODS`, or `module:Class` from elsewhere.

    Raises:
        ConfigError: no such method, or a class that is none.
    """
    if ":" in name:
        return _import_method(name)
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"unknown method {name!r};{hint} choose one of {', '.join(METHODS)}, or module:Class for one of your own"
        )
    return METHODS[name]


def make_method(name: str, head: Literal["auto", "personal", "shared"] = "auto") -> Method:
    """The method of a name, with its head personal or shared (`auto`: the method's own default).

    Raises:
        ConfigError: no such method, or a head placement that the method contradicts.
    """
    found = find_method(name)
    if head == "auto":
        return found()
    takes_head = "head" in inspect.signature(found).parameters
    method = found(head=head) if takes_head else found()
    placement = "personal" if Part.HEAD in method.personal_parts() else "shared"
    if head != placement:
        raise ConfigError(f"method.head: the head of method {name!r} is {placement}, got {head!r}; leave it at auto")
    return method


def _import_method(name: str) -> Callable[..., Method]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a foreign module does while it is imported
        raise ConfigError(
            f"{name!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}); install it or put "
            "its folder on PYTHONPATH"
        ) from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ConfigError(f"{name!r}: module {module_name!r} has no class {class_name!r}")
    missing = [member for member in _MEMBERS if getattr(found, member, None) is None]
    if missing:
        raise ConfigError(
            f"{name!r}: the class lacks {', '.join(missing)}; see sfedlora.methods.base.Method for what a method has"
        )
    if not isinstance(getattr(found, "traits"), Traits):  # noqa: B009 - the class is not known to be a Method yet
        raise ConfigError(f"{name!r}: traits is no sfedlora.methods.Traits")
    try:
        found()
    except Exception as error:
        raise ConfigError(
            f"{name!r}: cannot be made without arguments ({type(error).__name__}: {error}); give every field a default"
        ) from None
    return found
