"""Adapter directories: what is written, what is refused, and that nothing is ever half written or unpickled."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfedlora.errors import AdapterError, ConfigError, StorageError
from sfedlora.lora.peft_format import load_adapter, save_adapter
from sfedlora.types import AdapterLayout, Part, Target, select_parts

LAYOUT = AdapterLayout(
    (Target("layers.0.q", 6, 4), Target("layers.1.q", 6, 4)), {"score.weight": (3, 4), "score.bias": (3,)}, ("score",)
)
RANK = 2
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_A = "base_model.model.layers.0.q.lora_A.weight"


def factors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in LAYOUT.shapes(RANK).items()}


def save(
    directory: Path, tensors: dict[str, Tensor] | None = None, rank: int = RANK, layout: AdapterLayout = LAYOUT
) -> None:
    save_adapter(
        directory,
        factors() if tensors is None else tensors,
        layout=layout,
        rule="sfed",
        alpha=16,
        rank=rank,
        num_clients=4,
        dropout=0.05,
        task="sequence-classification",
        base_model_name="org/base",
        target_suffixes=["q"],
    )


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "new" / "adapter")
    loaded = load_adapter(tmp_path / "new" / "adapter", layout=LAYOUT)
    assert loaded.rank == RANK
    assert loaded.scaling == pytest.approx(16 * (4 / RANK) ** 0.5, rel=1e-15)
    assert list(loaded.tensors) == list(LAYOUT.shapes(RANK))
    assert all(loaded.tensors[name].equal(tensor) for name, tensor in factors().items())
    assert sorted(entry.name for entry in (tmp_path / "new" / "adapter").iterdir()) == [CONFIG, WEIGHTS]


def test_what_is_written(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": RANK,
        "lora_alpha": 32.0,
        "use_rslora": True,
        "lora_dropout": 0.05,
        "target_modules": ["q"],
        "modules_to_save": ["score"],
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert load_file(tmp_path / WEIGHTS).keys() == {
        KEY_A,
        "base_model.model.layers.1.q.lora_A.weight",
        "base_model.model.layers.0.q.lora_B.weight",
        "base_model.model.layers.1.q.lora_B.weight",
        "base_model.model.score.weight",
        "base_model.model.score.bias",
    }


def test_targets_are_full_paths_where_no_suffixes_are_given(tmp_path: Path) -> None:
    save_adapter(
        tmp_path,
        select_parts(factors(), [Part.A]),
        layout=LAYOUT,
        rule="lora",
        alpha=8,
        rank=RANK,
        task="causal-lm",
        base_model_name="x",
    )
    config = json.loads((tmp_path / CONFIG).read_text())
    assert sorted(config["target_modules"]) == ["layers.0.q", "layers.1.q"]
    assert (config["task_type"], config["modules_to_save"], config["lora_alpha"]) == ("CAUSAL_LM", None, 8)


def test_without_b_and_head(tmp_path: Path) -> None:
    save(tmp_path, select_parts(factors(), [Part.A]))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, None)
    loaded = load_adapter(tmp_path, layout=LAYOUT).tensors
    assert loaded.keys() == LAYOUT.shapes(RANK, [Part.A, Part.B]).keys()
    assert all((tensor == 0).all() == name.startswith("b:") for name, tensor in loaded.items())


def test_views_of_one_buffer_and_other_dtypes_are_written(tmp_path: Path) -> None:
    flat = torch.arange(24, dtype=torch.float32)
    views = {"a:layers.0.q": flat[:12].view(2, 6), "a:layers.1.q": flat[12:].view(2, 6).to(torch.bfloat16)}
    save(tmp_path, views)
    loaded = load_adapter(tmp_path, layout=LAYOUT).tensors
    assert loaded["a:layers.0.q"].equal(flat[:12].view(2, 6))
    assert loaded["a:layers.1.q"].equal(flat[12:].view(2, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a:layers.1.q"), "a:layers.1.q: missing"),
        (lambda t: t.pop("b:layers.1.q"), "b:layers.1.q: missing"),
        (lambda t: t.pop("head:score.bias"), "head:score.bias: missing"),
        (lambda t: t.update({"a:other": torch.zeros(1)}), "a:other: not a factor"),
        (lambda t: t.update({"b:layers.0.q": torch.zeros(4, 3)}), r"b:layers.0.q: \(4, 3\).*expected \(4, 2\)"),
        (lambda t: t.update({"b:layers.0.q": torch.zeros(4, 2).int()}), "b:layers.0.q: .*int32"),
        (lambda t: t["a:layers.0.q"].fill_(float("nan")), "a:layers.0.q: has values that are not finite"),
    ],
)
def test_factors_that_do_not_fit_are_not_written(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = factors()
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        save(tmp_path / "adapter", tensors)
    assert not (tmp_path / "adapter").exists()


def test_a_rank_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, AdapterError), match="rank"):
        save(tmp_path, {}, rank=0, layout=AdapterLayout((), {}))


def test_a_failed_write_leaves_the_old_files(tmp_path: Path) -> None:
    save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file: cannot be made"):
        save(tmp_path / "file", factors(1))
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).mkdir()  # the second file cannot take its place
    with pytest.raises(StorageError, match=f"{CONFIG}: cannot be written"):
        save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "file"]
    assert (tmp_path / WEIGHTS).read_bytes() == before[WEIGHTS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; expected 'LORA'"),
        ({"use_dora": True}, "use_dora = True is a LoRA variant"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 0}, "r = 0"),
        ({"r": "8"}, "r = '8'"),
        ({"r": 3}, r"layers.0.q.lora_A.weight has shape \(2, 6\); expected \(3, 6\)"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, layout=LAYOUT)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError, match=r"adapter_config.json.*JSON"):
        load_adapter(tmp_path, layout=LAYOUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY_A), f"{KEY_A} is missing"),
        (lambda t: t.pop("base_model.model.score.bias"), "base_model.model.score.bias is missing"),
        (
            lambda t: t.update({"base_model.model.other.lora_A.weight": torch.zeros(2, 6)}),
            "other.lora_A.weight belongs",
        ),
        (lambda t: t.update({KEY_A: torch.zeros(2, 7)}), rf"{KEY_A} has shape \(2, 7\); expected \(2, 6\)"),
        (lambda t: t.update({KEY_A: torch.zeros(12)}), rf"{KEY_A} has shape \(12,\)"),
        (lambda t: t.update({KEY_A: torch.zeros(2, 6).long()}), f"{KEY_A} has dtype I64"),
        (lambda t: t.update({KEY_A: torch.full((2, 6), torch.inf)}), f"{KEY_A} has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    save(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, layout=LAYOUT)


def test_a_configured_head_must_be_in_the_file(tmp_path: Path) -> None:
    save(tmp_path, select_parts(factors(), [Part.A, Part.B]))
    edit_config(tmp_path, modules_to_save=["score"])
    with pytest.raises(AdapterError, match=r"base_model.model.score.bias is missing \(2 of 6 keys\)"):
        load_adapter(tmp_path, layout=LAYOUT)


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_truncated_weight_file_is_refused(tmp_path: Path, cut: int) -> None:
    save(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not a readable safetensors file"):
        load_adapter(tmp_path, layout=LAYOUT)


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,64]}}',
        b'{"x":{"dtype":"F32","shape":[4000000000000],"data_offsets":[0,16000000000000]}}',
    ],
)
def test_a_header_that_claims_absurd_sizes_is_refused_unread(tmp_path: Path, header: bytes) -> None:
    save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(tmp_path, layout=LAYOUT)
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + header)
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(tmp_path, layout=LAYOUT)


def test_pickle_files_are_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors; adapter_model.bin is a pickle file"):
        load_adapter(tmp_path, layout=LAYOUT)
    assert not (tmp_path / "exploded").exists()


def test_directories_without_an_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no adapter_config.json \(found: no directory\)"):
        load_adapter(tmp_path / "nowhere", layout=LAYOUT)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(AdapterError, match=r"has no adapter_config.json \(found: model.safetensors\)"):
        load_adapter(tmp_path, layout=LAYOUT)
    save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tmp_path, layout=LAYOUT)
