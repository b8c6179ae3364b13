"""Where a base model's files are: hub snapshot, directory or converted GGUF file; which weights they hold.

Every source ends as one local directory with `config.json` and safetensors weights. A GGUF file is de-quantised to
bfloat16 once and kept under `cache_root()/models/<sha256 of the file>`.

Not here: building the model from the directory (`base_model`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from sfedlora.errors import ModelError
from sfedlora.sources import cache_root, local_path

__all__ = ["Checkpoint", "find_checkpoint", "quiet_transformers", "stored_dtype", "stored_weight"]

_LOG = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_NOT_FETCHED = ["*/*", "consolidated*", *(f"*{suffix}" for suffix in _PICKLES), "*.gguf", "*.onnx", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A base model's files.

    Attributes:
        directory: where they are.
        name_or_path: what stock `from_pretrained` loads them by: the hub id, or the directory.
        sha256: over the bytes of the weight files in name order; of the GGUF file itself for a converted one.
        weight_files: the safetensors files in name order.
    """

    directory: Path
    name_or_path: str
    sha256: str
    weight_files: tuple[Path, ...]


def find_checkpoint(source: str) -> Checkpoint:
    """Find, fetch or convert the files of a base model.

    Args:
        source: hub id, directory, `.gguf` file or `package:NAME/path`.

    Returns:
        The files, complete as far as their names tell.

    Raises:
        ModelError: nothing there, no configuration, no safetensors weights, a hub that cannot be reached, a GGUF file
            that cannot be converted.
        InputError: a `package:` source that does not exist.
    """
    path = local_path(source)
    if path is None:
        directory = _fetch(source)
        files = _weight_files(directory)
        return Checkpoint(directory, source, _sha256(files), files)
    if path.is_dir():
        files = _weight_files(path)
        return Checkpoint(path, str(path), _sha256(files), files)
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{source}: expected a model directory or a .gguf file, found the file {path.name}")
    digest = _sha256([path])
    directory = cache_root() / "models" / digest
    if not directory.is_dir():
        _convert_gguf(path, directory)
    return Checkpoint(directory, str(directory), digest, _weight_files(directory))


def stored_dtype(files: Sequence[Path]) -> str | None:
    """The dtype of the first floating-point weight ("float32", "bfloat16", "float16"), None if there is none.

    Raises:
        ModelError: a file that is not safetensors, or that is cut off.
    """
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    found: str | None = None
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in () if found else file.keys():
                    found = found or names.get(file.get_slice(key).get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
    return found


def stored_weight(checkpoint: Checkpoint, name: str, source: str) -> Tensor:
    """One weight, without reading the others.

    Raises:
        ModelError: no file has a weight of this name (the architecture loads it under another one).
    """
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - no mapping
                weight: Tensor = file.get_tensor(name)
                return weight.clone()
    raise ModelError(f"{source}: {name} is stored under another name and cannot be read by itself")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, log lines or Python warnings from transformers inside; its settings come back after.

    The GGUF reader draws its bar without asking these settings, so standard error is held back too.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _fetch(source: str) -> Path:
    """The local snapshot of a hub model; pickles, code and sub-folders are not fetched."""
    if source.startswith(("/", ".", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        raise ModelError(f"model source {source!r} does not exist")
    try:
        with quiet_transformers():
            return Path(snapshot_download(source, ignore_patterns=_NOT_FETCHED))
    except GatedRepoError as error:
        raise ModelError(f"model source {source!r} is gated on the hub; ask for access and log in first") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelError(f"model source {source!r} is neither a local path nor a model on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model source {source!r} is no local path, and the hub could not be reached or refused it "
            f"({type(error).__name__}); give a directory, or fetch the model first"
        ) from error


def _weight_files(directory: Path) -> tuple[Path, ...]:
    present = sorted(entry.name for entry in directory.iterdir())
    shown = ", ".join(present[:12]) or "nothing"
    if "config.json" not in present:
        hint = "; this is a PEFT adapter, give its base model" if "adapter_config.json" in present else ""
        raise ModelError(f"{directory} has no config.json (found: {shown}){hint}")
    if "model.safetensors" in present:
        return (directory / "model.safetensors",)
    if _INDEX in present:
        return _indexed_files(directory)
    if any(name.endswith(_PICKLES) for name in present):
        raise ModelError(f"{directory} has only pickled weights, which are never read; convert them to safetensors")
    raise ModelError(f"{directory} has no weights; expected model.safetensors (found: {shown})")


def _indexed_files(directory: Path) -> tuple[Path, ...]:
    try:
        shards = sorted(set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{directory / _INDEX} is not a readable index of weights: {error!r}") from error
    missing = [name for name in shards if not (directory / str(name)).is_file()]
    if missing:
        raise ModelError(f"{directory} lacks {missing[0]}, which {_INDEX} names")
    return tuple(directory / name for name in shards)


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _convert_gguf(path: Path, directory: Path) -> None:
    """De-quantise a GGUF file into a directory, which appears whole or not at all."""
    if find_spec("gguf") is None:
        raise ModelError(f"{path.name} needs the gguf reader; install it with: pip install 'sfedlora[gguf]'")
    _LOG.info("converting %s to safetensors, once, into %s", path.name, directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name[:12]}-", dir=directory.parent))
    except OSError as error:
        raise ModelError(
            f"{path.name} is converted into {directory.parent}, which cannot be written ({error.strerror}); "
            "set SFEDLORA_CACHE to a folder that can"
        ) from None
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                trust_remote_code=False,
            )
            model.save_pretrained(staging)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(staging)
        staging.rename(directory)
    except Exception as error:  # the reader raises whatever a broken file makes it stumble on
        if directory.is_dir():  # somebody else converted the same file meanwhile
            return
        raise ModelError(f"{path} could not be converted from GGUF: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
