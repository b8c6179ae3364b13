"""Base models: a source string becomes a frozen model with its tokenizer.

    hub id | directory | file.gguf | package:NAME/path  ->  BaseModel, or a Skeleton without weights

Only safetensors weights are read and no code of a checkpoint is run. Not here: where the files are (`checkpoint`),
what happens to weights that a checkpoint lacks (`new_weights`), LoRA (`inject`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sfedlora.errors import ConfigError, ModelError
from sfedlora.lora.checkpoint import find_checkpoint, quiet_transformers, stored_dtype, stored_weight
from sfedlora.lora.new_weights import (
    classification_head,
    draw_new_weights,
    drawn_weight,
    name_new_modules,
    refuse_unusable,
)
from sfedlora.lora.targets import find_layout, minimal_suffixes
from sfedlora.types import AdapterLayout, Part, Tensors, factor_name

__all__ = ["BaseModel", "Quantization", "Skeleton", "Task", "load_base_model", "load_skeleton", "resolve_dtype"]

Task = Literal["causal-lm", "sequence-classification"]
Quantization = Literal["none", "8bit", "4bit"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: in eval mode, on one device.
        tokenizer: always with a padding token.
        name_or_path: what stock `from_pretrained` loads the weights by: hub id or directory.
        sha256: over the weight files in name order (for GGUF: of the file).
        new_modules: modules that the checkpoint lacks, and the classification head in any case; they must be trained
            and saved with the adapter (PEFT's `modules_to_save`).
        dtype: of the weights: "float32", "bfloat16" or "float16".
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name_or_path: str
    sha256: str
    new_modules: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Skeleton:
    """A base model without its weights: what a server needs that never computes with it.

    Attributes:
        name_or_path, sha256, dtype: as in `BaseModel`.
        layout: which factors an adapter has.
        target_suffixes: how PEFT's `target_modules` names the adapted modules.
        head: factor name -> initial value, float32, of every parameter trained in full.
    """

    name_or_path: str
    sha256: str
    dtype: str
    layout: AdapterLayout
    target_suffixes: tuple[str, ...]
    head: Tensors


def load_base_model(
    source: str,
    *,
    task: Task,
    dtype: str = "auto",
    quantization: Quantization = "none",
    device: str = "cpu",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    seed: int = 0,
) -> BaseModel:
    """Load a base model for one task.

    Args:
        source: hub id, directory, `.gguf` file or `package:NAME/path`.
        task: "causal-lm" or "sequence-classification".
        dtype: "auto" (see `resolve_dtype`), "float32", "bfloat16" or "float16".
        quantization: "8bit" or "4bit" (NF4) stores the linear weights so, through bitsandbytes; embeddings, norms,
            output layer and new modules stay in `dtype`, in which products are computed too.
        device: a torch device.
        num_labels: classes of a classification; None takes the number of `label_names`, else the checkpoint's.
        label_names: their names, in the order of their ids.
        seed: weights that the checkpoint lacks are drawn from it.

    Returns:
        The model in eval mode, its tokenizer and where they came from.

    Raises:
        ModelError: files that are missing, broken, pickled or made for something else; a task that the architecture
            does not have.
        ConfigError: a dtype, device, task or number of labels that does not exist or does not fit.
        InputError: a `package:` source that does not exist.
    """
    _check_request(task, device, num_labels, label_names)
    checkpoint = find_checkpoint(source)
    resolved = resolve_dtype(dtype, device=device, checkpoint_dtype=stored_dtype(checkpoint.weight_files))
    config = _load_config(checkpoint.directory, source, _label_settings(task, num_labels, label_names))
    if task == "causal-lm" and _is_encoder(config):
        raise ModelError(f"{source}: architecture {config.model_type!r} reads in both directions; it has no {task!r}")
    tokenizer = _load_tokenizer(checkpoint.directory, source)
    quantized = _quantization_settings(quantization, resolved)
    placement = {} if quantized is None else {"quantization_config": quantized, "device_map": {"": device}}
    model, missing, new_modules = _load_model(checkpoint.directory, config, task, resolved, source, placement=placement)
    draw_new_weights(model, missing, seed)
    _set_padding(model, tokenizer, source)
    if quantization == "4bit":
        _keep_differentiable(model)
    model = (model if quantized else model.to(device)).eval()
    return BaseModel(model, tokenizer, checkpoint.name_or_path, checkpoint.sha256, new_modules, resolved)


def load_skeleton(
    source: str,
    *,
    task: Task,
    target_modules: str | Sequence[str],
    dtype: str = "auto",
    device: str = "cpu",
    label_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Skeleton:
    """What `load_base_model` and `adapt` would give, without reading weights other than those trained in full.

    Args:
        source: as in `load_base_model`, like all but one of the others.
        task: decides the head.
        target_modules: as in `adapt`.
        dtype: the head's values are rounded to it.
        device: what "auto" depends on; nothing is put there.
        label_names: names of the classes, in the order of their ids.
        seed: weights that the checkpoint lacks are drawn from it.

    Raises:
        ModelError, ConfigError, InputError: as `load_base_model` and `find_targets`.
    """
    _check_request(task, device, None, label_names)
    checkpoint = find_checkpoint(source)
    resolved = resolve_dtype(dtype, device=device, checkpoint_dtype=stored_dtype(checkpoint.weight_files))
    config = _load_config(checkpoint.directory, source, _label_settings(task, None, label_names))
    placement = {"device_map": {"": "meta"}}
    model, missing, new_modules = _load_model(checkpoint.directory, config, task, resolved, source, placement=placement)
    layout = find_layout(model, target_modules, head_modules=new_modules)
    head = {
        factor_name(Part.HEAD, path): (
            drawn_weight(model, path, seed) if path in missing else stored_weight(checkpoint, path, source)
        )
        .to(_DTYPES[resolved])
        .float()
        for path in layout.head
    }
    suffixes = minimal_suffixes(model, layout.targets)
    return Skeleton(checkpoint.name_or_path, checkpoint.sha256, resolved, layout, suffixes, head)


def resolve_dtype(dtype: str, *, device: str, checkpoint_dtype: str | None) -> str:
    """The dtype that the base model is loaded in.

    "auto" is the checkpoint's own dtype where the device computes it natively, else float32: bfloat16 needs oneDNN's
    native support on a CPU (AVX512_BF16 or AMX) and compute capability 8 on CUDA; float16 on a CPU is float32.

    Args:
        dtype: "auto" or a name, which is returned as it is (float16 on a CPU excepted, which is refused).
        device: a torch device.
        checkpoint_dtype: dtype of the stored weights, None if unknown.

    Returns:
        "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: an unknown dtype, or float16 on a CPU.
    """
    on_cpu = torch.device(device).type == "cpu"
    if dtype == "auto":
        return checkpoint_dtype if checkpoint_dtype in _DTYPES and _is_native(checkpoint_dtype, device) else "float32"
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}; expected auto, {', '.join(_DTYPES)}")
    if dtype == "float16" and on_cpu:
        raise ConfigError("dtype float16 on a CPU; use auto, float32 or bfloat16")
    return dtype


def _is_native(dtype: str, device: str) -> bool:
    kind = torch.device(device).type
    if dtype == "bfloat16" and kind == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == "bfloat16" and kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return dtype == "float32" or kind != "cpu"


def _check_request(task: str, device: str, num_labels: int | None, label_names: Sequence[str] | None) -> None:
    if task not in get_args(Task):
        raise ConfigError(f"task {task!r}; expected one of {', '.join(get_args(Task))}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} does not exist; expected for example cpu or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no CUDA device here")
    if label_names is not None and num_labels is not None and len(label_names) != num_labels:
        raise ConfigError(f"num_labels = {num_labels}, but {len(label_names)} label names")


def _label_settings(task: Task, num_labels: int | None, label_names: Sequence[str] | None) -> dict[str, Any]:
    if task == "causal-lm":
        return {}
    settings: dict[str, Any] = {"problem_type": "single_label_classification"}
    if label_names is not None:
        settings["id2label"] = dict(enumerate(label_names))
        settings["label2id"] = {name: number for number, name in enumerate(label_names)}
    elif num_labels is not None:
        settings["num_labels"] = num_labels
    return settings


def _load_config(directory: Path, source: str, settings: dict[str, Any]) -> Any:
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            config.update(settings)
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source}: config.json cannot be used: {_one_line(error)}") from error


def _is_encoder(config: Any) -> bool:
    """Whether a BERT-like configuration, which has the switch `is_decoder`, leaves it off."""
    return config.to_dict().get("is_decoder") is False and not config.is_encoder_decoder


def _load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for broken files
        raise ModelError(f"{source}: no usable tokenizer in {directory}: {_one_line(error)}") from error


def _quantization_settings(quantization: Quantization, dtype: str) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    try:
        metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"model.quantization: {quantization} needs bitsandbytes, which is not installed; "
            "pip install 'sfedlora[quantization]'"
        ) from None
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_DTYPES[dtype])


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first forward without gradient on a CPU.

    The packed form has no backward: gradients would silently end at the module.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _load_model(
    directory: Path,
    config: Any,
    task: Task,
    dtype: str,
    source: str,
    *,
    placement: Mapping[str, Any],
) -> tuple[PreTrainedModel, set[str], tuple[str, ...]]:
    """The model, the parameters to be drawn anew (lacking, or of another shape), and the modules to train in full."""
    auto_class = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, info = auto_class.from_pretrained(
                directory,
                config=config,
                dtype=_DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **placement,
            )
    except Exception as error:  # transformers raises errors of many kinds for files that do not fit
        if "Unrecognized configuration class" in str(error):
            raise ModelError(f"{source}: architecture {config.model_type!r} has no model for task {task!r}") from error
        raise ModelError(f"{source}: the model could not be loaded: {_one_line(error)}") from error
    parameters = {name for name, _ in model.named_parameters()}
    missing = set(info["missing_keys"]) & parameters
    mismatched = {name for name, *_ in info["mismatched_keys"]} & parameters
    head = classification_head(model) if task == "sequence-classification" else None
    refuse_unusable(model, missing, mismatched, head=head, source=source)
    drawn = missing | mismatched
    return model, drawn, name_new_modules(model, drawn, always=() if head is None else (head,))


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{source}: the tokenizer has neither a padding nor an end token; add one to its files")
        tokenizer.pad_token = tokenizer.eos_token
    num_embeddings = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= num_embeddings:
        raise ModelError(
            f"{source}: padding token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, the model only "
            f"{num_embeddings} embeddings; the tokenizer belongs to another model"
        )
    model.config.pad_token_id = tokenizer.pad_token_id


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
