"""A PEFT directory: `adapter_config.json NUL adapter_model.safetensors`."""

from __future__ import annotations

from fuzz.scratch import write_scratch
from sfedlora.errors import SfedLoraError
from sfedlora.lora.peft_format import load_adapter
from sfedlora.types import AdapterLayout, Target

LAYOUT = AdapterLayout(
    targets=(Target("model.layers.0.q_proj", 3, 2), Target("model.layers.0.v_proj", 3, 4)),
    head={"score.weight": (2, 3)},
    head_modules=("score",),
)


def fuzz_one(data: bytes) -> None:
    """Only typed errors come out; what is accepted has the layout's shapes."""
    config, _, weights = data.partition(b"\0")
    write_scratch("adapter_config.json", config)
    folder = write_scratch("adapter_model.safetensors", weights).parent
    try:
        loaded = load_adapter(folder, layout=LAYOUT)
    except SfedLoraError:
        return
    shapes = LAYOUT.shapes(loaded.rank)
    if any(tuple(tensor.shape) != shapes[name] for name, tensor in loaded.tensors.items()):
        raise AssertionError("a factor of another shape was accepted")
