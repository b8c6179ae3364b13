"""Which modules of a model carry LoRA and which are trained in full, by PEFT's conventions.

Matching is PEFT's own: its table of default targets per architecture, its "all-linear", its rules for regular
expressions and name suffixes, its rule that a module saved in full is never adapted. Nothing is changed in the model.

Not here: wrapping the modules (`inject`), the files in which these names are written (`peft_format`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from sfedlora.errors import ModelError
from sfedlora.lora.layer import LoraLinear, linear_features
from sfedlora.types import AdapterLayout, Target

__all__ = ["find_head_modules", "find_layout", "find_targets", "minimal_suffixes"]


def find_layout(
    model: PreTrainedModel, target_modules: str | Sequence[str], *, head_modules: Sequence[str] = ()
) -> AdapterLayout:
    """Which factors an adapter of a model has; as `find_targets` and `find_head_modules`, whose errors it raises."""
    head_paths = find_head_modules(model, head_modules)
    targets = find_targets(model, target_modules, head_paths=head_paths)
    head = {
        f"{path}.{name}": tuple(parameter.shape)
        for path in head_paths
        for name, parameter in model.get_submodule(path).named_parameters()
    }
    return AdapterLayout(targets, head, tuple(head_modules))


def find_targets(
    model: PreTrainedModel, target_modules: str | Sequence[str], *, head_paths: Sequence[str] = ()
) -> tuple[Target, ...]:
    """The linear modules to adapt, in model order.

    Args:
        model: the base model, not adapted yet.
        target_modules: "default" (PEFT's table for the architecture), "all-linear", a regular expression that must
            match a whole module path, or a list of path suffixes.
        head_paths: modules trained in full; nothing inside them is adapted.

    Returns:
        At least one target.

    Raises:
        ModelError: an architecture without default targets, a broken regular expression, a match that is not a linear
            module, no match at all, or a model that is adapted already.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ModelError("the model is adapted already; load the base model again to adapt it differently")
    config = LoraConfig(target_modules=_requested(model, target_modules))
    config = _maybe_include_all_linear_layers(config, model)
    inside_head = tuple(f"{path}." for path in head_paths)
    targets = []
    for path, module in model.named_modules():
        if path in head_paths or path.startswith(inside_head) or not _matches(config, path):
            continue
        features = linear_features(module)
        if features is None:
            raise ModelError(
                f"target_modules {_shown(target_modules)} matches {path!r}, a {type(module).__name__}; only linear "
                "modules can be adapted"
            )
        targets.append(Target(path, *features))
    if not targets:
        raise ModelError(
            f"target_modules {_shown(target_modules)} matches nothing in {type(model).__name__}; its linear modules "
            f"are named {', '.join(_linear_names(model))}"
        )
    return tuple(targets)


def find_head_modules(model: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules trained in full: every module whose path ends with one of the names, as PEFT matches.

    PEFT compares characters, not path components: "classifier" also finds DistilBERT's `pre_classifier`. Modules
    inside a found module belong to it.

    Raises:
        ModelError: a name that no module with parameters ends with.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and path.endswith(tuple(names)) and next(module.parameters(), None) is not None:
            found.append(path)
    for name in names:
        if not any(path.endswith(name) for path in found):
            there = ", ".join(name for name, child in model.named_children() if any(True for _ in child.parameters()))
            raise ModelError(f"head module {name!r} is not in {type(model).__name__}; its top-level modules: {there}")
    return tuple(found)


def minimal_suffixes(model: nn.Module, targets: Sequence[Target]) -> tuple[str, ...]:
    """The shortest list of path suffixes that matches exactly these targets among all modules of the model."""
    paths = [target.path for target in targets]
    others = {path for path, _ in model.named_modules() if path} - set(paths)
    suffixes = sorted(_find_minimal_target_modules(paths, sorted(others)))
    exact = not any(_ends_with(path, suffixes) for path in others) and all(_ends_with(path, suffixes) for path in paths)
    return tuple(suffixes) if exact else tuple(paths)


def _requested(model: PreTrainedModel, target_modules: str | Sequence[str]) -> str | list[str]:
    """What PEFT's `target_modules` would be."""
    if not isinstance(target_modules, str):
        return list(target_modules)
    if target_modules != "default":
        return _checked_pattern(target_modules)
    model_type = model.config.model_type
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if default is None:
        raise ModelError(
            f"there are no default target modules for architecture {model_type!r}; set lora.target_modules to "
            f'"all-linear" or to some of: {", ".join(_linear_names(model))}'
        )
    return default if isinstance(default, str) else list(default)


def _checked_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ModelError(f"target_modules {pattern!r} is not a regular expression: {error}") from error
    return pattern


def _matches(config: LoraConfig, path: str) -> bool:
    return bool(path) and bool(check_target_module_exists(config, path))


def _ends_with(path: str, suffixes: Sequence[str]) -> bool:
    return any(path == suffix or path.endswith(f".{suffix}") for suffix in suffixes)


def _linear_names(model: nn.Module) -> list[str]:
    """Last path components of all linear modules, in model order, each once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [path.rsplit(".", 1)[-1] for path, module in model.named_modules() if linear_features(module)]
    return list(dict.fromkeys(names))


def _shown(target_modules: str | Sequence[str]) -> str:
    return repr(target_modules) if isinstance(target_modules, str) else str(list(target_modules))
