"""Our layers and files against stock PEFT, on tiny random models of every supported family.

Tolerance: 1e-5 of the largest value, float32. PEFT is the oracle; nothing of ours runs inside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.lora.peft_format import load_adapter, save_adapter
from sfedlora.types import Part, part_of, path_of
from support.families import FAMILIES, Family
from support.tiny_models import VOCAB_SIZE, tiny_t5_encoder

RANK, ALPHA = 4, 6.0
IDS = torch.randint(3, VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor([0, 0, 1]), torch.tensor([7, 8, 8])), torch.tensor(0))
LABELS = torch.tensor([0, 2, 1, 1])

# PEFT says so whenever it meets a Conv1D, also on its own files.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
every_choice = pytest.mark.parametrize("targets", ["default", "all-linear"])


def run(model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Logits (hidden states of the encoder) and a loss."""
    arguments = {"input_ids": IDS, "attention_mask": MASK}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if "EncoderModel" in type(inner).__name__:
        hidden = model(**arguments).last_hidden_state
        return hidden, hidden.square().mean()
    labels = LABELS if "Classification" in type(inner).__name__ else IDS
    output = model(**arguments, labels=labels)
    return output.logits, output.loss


def resident_of(family: Family, targets: str) -> ResidentModel:
    resident = adapt(family.build(), target_modules=targets, rank=RANK, head_modules=family.head_modules)
    resident.scaling = ALPHA / RANK
    generator = torch.Generator().manual_seed(7)
    resident.load({n: torch.randn(s, generator=generator) * 0.2 for n, s in resident.layout.shapes(RANK).items()})
    return resident


def peft_of(family: Family, targets: str) -> PeftModel:
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=None if targets == "default" else targets,
        modules_to_save=list(family.head_modules) or None,
        task_type=family.peft_task,
    )
    return get_peft_model(family.build(), config).eval()


def peft_parameter(model: PeftModel, name: str, head_modules: tuple[str, ...]) -> torch.nn.Parameter:
    """The parameter of a PEFT model that a factor name means."""
    path = path_of(name)
    if part_of(name) is not Part.HEAD:
        layer = model.get_base_model().get_submodule(path)
        pair = layer.lora_A if part_of(name) is Part.A else layer.lora_B
        parameter: torch.nn.Parameter = pair["default"].weight
        return parameter
    head = next(m for m in head_modules if f".{m}." in f".{path}")
    before, _, after = f".{path}".partition(f".{head}.")
    head_path = f"{before}.{head}.modules_to_save.default.{after}".lstrip(".")
    whole: torch.nn.Parameter = model.get_base_model().get_parameter(head_path)
    return whole


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    largest = expected.abs().max()
    assert largest > 0, what
    assert (found - expected).abs().max() <= 1e-5 * largest, what


@every_family
@every_choice
def test_logits_and_gradients(family: Family, targets: str) -> None:
    resident, peft_model = resident_of(family, targets), peft_of(family, targets)
    names = resident.layout.shapes(RANK)
    count = sum(isinstance(module, BaseTunerLayer) for module in peft_model.modules())
    assert count == len(resident.layout.targets)
    with torch.no_grad():
        for name, value in resident.read().items():
            peft_parameter(peft_model, name, family.head_modules).copy_(value)
    (logits, loss), (expected_logits, expected_loss) = run(resident.model), run(peft_model)
    assert_close(logits, expected_logits, "logits")
    loss.backward()
    expected_loss.backward()
    ours = {part: resident.flat_grad(part) for part in Part}
    for part in Part:
        expected = [
            peft_parameter(peft_model, name, family.head_modules).grad for name in names if part_of(name) is part
        ]
        if expected:
            assert_close(ours[part], torch.cat([grad.flatten() for grad in expected if grad is not None]), part.value)


@every_family
@every_choice
def test_stock_peft_loads_our_files(family: Family, targets: str, tmp_path: Path) -> None:
    resident = resident_of(family, targets)
    resident.scaling = ALPHA * (5 / RANK) ** 0.5
    save_adapter(
        tmp_path,
        resident.read(),
        layout=resident.layout,
        rule="sfed",
        alpha=ALPHA,
        rank=RANK,
        num_clients=5,
        dropout=0.1,
        task=family.task,  # type: ignore[arg-type]
        base_model_name="the/base",
        target_suffixes=resident.target_suffixes if targets == "default" else None,
    )
    if family.build is tiny_t5_encoder:  # layers only: an encoder has neither of our tasks
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"task_type": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(family.build(), tmp_path).eval()
    assert_close(run(resident.model)[0], run(loaded)[0], "logits")
    merged = PeftModel.from_pretrained(family.build(), tmp_path).merge_and_unload().eval()
    torch.testing.assert_close(run(merged)[0], run(resident.model)[0], rtol=1e-4, atol=1e-5)


@every_family
@every_choice
def test_we_load_files_of_stock_peft_and_write_the_same_keys(family: Family, targets: str, tmp_path: Path) -> None:
    peft_model = peft_of(family, targets)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft_model.save_pretrained(tmp_path / "peft")
    resident = adapt(family.build(), target_modules=targets, rank=RANK, head_modules=family.head_modules)
    loaded = load_adapter(tmp_path / "peft", layout=resident.layout)
    assert (loaded.rank, loaded.scaling) == (RANK, ALPHA / RANK)
    resident.load(loaded.tensors)
    resident.scaling = loaded.scaling
    assert_close(run(resident.model)[0], run(peft_model)[0], "logits")

    save_adapter(
        tmp_path / "ours",
        loaded.tensors,
        layout=resident.layout,
        rule="lora",
        alpha=ALPHA,
        rank=RANK,
        task=family.task,  # type: ignore[arg-type]
        base_model_name="the/base",
        target_suffixes=resident.target_suffixes,
    )
    assert stored(tmp_path / "ours") == stored(tmp_path / "peft")
    ours, theirs = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    if targets == "default":  # PEFT writes long lists of full paths for small models adapted everywhere
        assert set(ours["target_modules"]) == set(theirs["target_modules"])
    for key in ("r", "lora_alpha", "use_rslora", "peft_type", "bias", "inference_mode"):
        assert ours[key] == theirs[key], key


def stored(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        return {
            key: (
                str(file.get_tensor(key).dtype),
                list(file.get_tensor(key).shape),
                file.get_tensor(key).numpy().tobytes(),
            )
            for key in file.keys()  # noqa: SIM118 - a safetensors file is not a mapping
        }


def test_a_shared_adapter_without_head_and_b_loads_with_stock_peft(tmp_path: Path) -> None:
    family = FAMILIES["roberta"]
    resident = resident_of(family, "default")
    save_adapter(
        tmp_path,
        resident.read([Part.A]),
        layout=resident.layout,
        rule="rslora",
        alpha=ALPHA,
        rank=RANK,
        task="sequence-classification",
        base_model_name="the/base",
        target_suffixes=resident.target_suffixes,
    )
    loaded = PeftModel.from_pretrained(family.build(), tmp_path).eval()
    assert_close(run(loaded)[0], run(family.build())[0], "logits")
    layer = loaded.get_base_model().get_submodule(resident.layout.targets[0].path)
    assert layer.lora_A["default"].weight.equal(next(iter(resident.read([Part.A]).values())))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_a_bfloat16_base(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.build().to(torch.bfloat16)
    resident = adapt(model, target_modules="default", rank=RANK, head_modules=family.head_modules)
    resident.load(resident_of(family, "default").read())
    resident.scaling = ALPHA / RANK
    save_adapter(
        tmp_path,
        resident.read(),
        layout=resident.layout,
        rule="lora",
        alpha=ALPHA,
        rank=RANK,
        task=family.task,  # type: ignore[arg-type]
        base_model_name="the/base",
    )
    stock = PeftModel.from_pretrained(family.build().to(torch.bfloat16), tmp_path).eval()
    logits, expected = run(resident.model)[0].float(), run(stock)[0].float()
    # Without a head the operations are the same ones; a head is float32 here and bfloat16 in stock PEFT.
    tolerance = 0.03 if family.head_modules else 1e-5
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
