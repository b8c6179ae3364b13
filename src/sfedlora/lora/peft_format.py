"""Adapter directories in PEFT's format, both ways; the only module that knows PEFT's keys.

    adapter_config.json        r, lora_alpha, use_rslora, target_modules, modules_to_save, task_type, ...
    adapter_model.safetensors  base_model.model.<path>.lora_A.weight, the same for B, base_model.model.<head parameter>

What is written loads with stock `PeftModel.from_pretrained`; what stock PEFT writes for plain LoRA loads here. Variants
that compute something else (DoRA, LoRA biases, ranks or alphas per module) are refused. Pickle files are never read.

Not here: how a file is replaced whole (`storage`).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sfedlora.errors import AdapterError, StorageError
from sfedlora.lora.scaling import ScalingRule, peft_config
from sfedlora.storage import make_directory, require_header, write_bytes
from sfedlora.types import AdapterLayout, Part, Tensors, factor_name, part_of, path_of

__all__ = ["LoadedAdapter", "load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
_FLOATS = ("F64", "F32", "F16", "BF16")
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1_000_000
_REFUSED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a directory.

    Attributes:
        tensors: float32 factors on the CPU, in the order of `layout.shapes(rank)`; without the head if the directory
            has none.
        rank: rank of every pair.
        scaling: gamma as stock PEFT would apply it.
    """

    tensors: dict[str, Tensor]
    rank: int
    scaling: float


def save_adapter(
    directory: Path,
    tensors: Tensors,
    *,
    layout: AdapterLayout,
    rule: ScalingRule,
    alpha: float,
    rank: int,
    num_clients: float = 1.0,
    dropout: float = 0.0,
    task: Literal["causal-lm", "sequence-classification"],
    base_model_name: str,
    target_suffixes: Sequence[str] | None = None,
    private: bool = False,
) -> None:
    """Write one adapter; each of the two files appears whole and on the disk, or not at all.

    Args:
        directory: made if it does not exist.
        tensors: every A, and either every B or none (then B is written as zeros), and the whole head or none of it.
            Without a head the directory has no `modules_to_save` and no task type, because PEFT adds the head of a
            classification task by itself and would then miss it.
        layout: the adapter's targets and head.
        rule: scaling rule.
        alpha: alpha of the rule.
        rank: rank of the factors.
        num_clients: N of the rule `sfed`.
        dropout: dropout on the LoRA inputs, recorded.
        task: decides PEFT's task type.
        base_model_name: what stock `from_pretrained` loads the base model by.
        target_suffixes: how `target_modules` names the targets (`ResidentModel.target_suffixes`); None writes their
            full paths, which means the same.
        private: the directory and its files are open to their owner alone, whatever the umask.

    Raises:
        AdapterError: factors that are unknown, missing, of another shape, not floating point or not finite.
        ConfigError: scaling values outside their range.
        StorageError: a file could not be written; what it had before is intact.
    """
    full = _complete(tensors, layout, rank)
    head = [name for name in full if part_of(name) is Part.HEAD]
    config = peft_config(
        rule,
        alpha=alpha,
        rank=rank,
        num_clients=num_clients,
        target_modules=list(target_suffixes or (target.path for target in layout.targets)),
        dropout=dropout,
        task_type=_TASK_TYPES[task] if head or task == "causal-lm" else None,
        modules_to_save=list(layout.head_modules) if head else None,
    )
    config.target_modules = sorted(config.target_modules)  # PEFT makes it a set, whose order changes with the process
    config.base_model_name_or_path = base_model_name
    config.inference_mode = True
    stored = {_key(name): tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in full.items()}
    content = save(stored, metadata={"format": "pt"})
    try:
        with tempfile.TemporaryDirectory() as scratch:  # PEFT writes its configuration to folders only
            config.save_pretrained(scratch)
            described = (Path(scratch) / _CONFIG).read_bytes()
    except OSError as error:
        raise StorageError(f"{tempfile.gettempdir()}: cannot be written ({error.strerror}); free space?") from None
    make_directory(directory, private=private)
    write_bytes(directory / _WEIGHTS, content, private=private)
    write_bytes(directory / _CONFIG, described, private=private)


def load_adapter(directory: Path, *, layout: AdapterLayout) -> LoadedAdapter:
    """Read and check one adapter.

    Names, shapes and dtypes are compared with the file's header before any tensor is read.

    Args:
        directory: a directory as `save_adapter` or stock PEFT writes it.
        layout: what the adapter must fit.

    Returns:
        The factors in float32, the rank and the scaling.

    Raises:
        AdapterError: files that are missing, broken or pickled; a LoRA variant; a key that is missing or unknown; a
            shape, dtype or value that cannot be used. The message names the file and the key.
    """
    config = _read_config(directory)
    rank, scaling = _rank_and_scaling(config, directory / _CONFIG)
    path = directory / _WEIGHTS
    if not path.is_file():
        pickled = f"; {_PICKLE} is a pickle file, which is never read" if (directory / _PICKLE).exists() else ""
        raise AdapterError(f"{directory} has no {_WEIGHTS}{pickled}")
    try:
        require_header(path)
        with safe_open(path, framework="pt") as file:
            shapes = _expected(set(file.keys()), config, layout, rank, path)
            for name, shape in shapes.items():
                _check_header(file.get_slice(_key(name)), name, shape, path)
            tensors = {name: file.get_tensor(_key(name)).to(torch.float32) for name in shapes}
    except (SafetensorError, StorageError, OSError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {_key(name)} has values that are not finite")
    return LoadedAdapter(tensors, rank, scaling)


def _complete(tensors: Tensors, layout: AdapterLayout, rank: int) -> dict[str, Tensor]:
    """The factors to write, in the order of the layout: B filled with zeros or the head left out where they lack."""
    shapes = layout.shapes(rank)
    unknown = [name for name in tensors if name not in shapes]
    if unknown:
        raise AdapterError(f"{unknown[0]}: not a factor of this adapter")
    present = {part for part in Part if any(part_of(name) is part for name in tensors)} | {Part.A}
    full: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        part = part_of(name)
        if part not in present:
            if part is Part.B:
                full[name] = torch.zeros(shape)
            continue
        if name not in tensors:
            raise AdapterError(f"{name}: missing from the adapter to save")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise AdapterError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}; expected {shape}, floating point")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name}: has values that are not finite")
        full[name] = tensor
    return full


def _key(name: str) -> str:
    """PEFT's key of a factor."""
    suffix = {Part.A: ".lora_A.weight", Part.B: ".lora_B.weight", Part.HEAD: ""}[part_of(name)]
    return f"{_PREFIX}{path_of(name)}{suffix}"


def _read_config(directory: Path) -> Mapping[str, Any]:
    path = directory / _CONFIG
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path}: {size} bytes is no adapter configuration; expected at most {MAX_CONFIG_BYTES}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(entry.name for entry in directory.iterdir())) if directory.is_dir() else "no directory"
        raise AdapterError(f"{directory} has no {_CONFIG} (found: {there or 'nothing'})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; expected 'LORA'")
    for option in _REFUSED:
        if config.get(option):
            raise AdapterError(f"{path}: {option} = {config[option]!r} is a LoRA variant that is not supported")
    return config


def _rank_and_scaling(config: Mapping[str, Any], path: Path) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"{path}: r = {_shown(rank)}; expected an integer from 1 to {MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise AdapterError(f"{path}: lora_alpha = {_shown(alpha)}; expected a finite number")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _shown(value: object) -> str:
    """A value as a message shows it; a number of many digits cut off."""
    text = (
        repr(value) if not isinstance(value, int) or abs(value) < 10**18 else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) <= 80 else f"{text[:80]}..."


def _expected(
    keys: set[str], config: Mapping[str, Any], layout: AdapterLayout, rank: int, path: Path
) -> dict[str, tuple[int, ...]]:
    """The factors that the file must have; the head only where the file or the configuration has one."""
    head_keys = {_key(factor_name(Part.HEAD, parameter)) for parameter in layout.head}
    has_head = bool(head_keys & keys) or bool(config.get("modules_to_save"))
    shapes = layout.shapes(rank, tuple(Part) if has_head else (Part.A, Part.B))
    known = {_key(name) for name in shapes}
    missing, extra = sorted(known - keys), sorted(keys - known)
    if missing:
        raise AdapterError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(known)} keys)")
    if extra:
        raise AdapterError(f"{path}: {extra[0]} belongs to no part of this adapter ({len(extra)} such keys)")
    return shapes


def _check_header(header: Any, name: str, shape: tuple[int, ...], path: Path) -> None:
    found, dtype = tuple(header.get_shape()), header.get_dtype()
    if dtype not in _FLOATS:
        raise AdapterError(f"{path}: {_key(name)} has dtype {dtype}; expected one of {', '.join(_FLOATS)}")
    if found != shape:
        raise AdapterError(f"{path}: {_key(name)} has shape {found}; expected {shape}")
