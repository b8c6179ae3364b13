"""Which modules a stack of clients can adapt, on models that give them something else than a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfedlora.lora.inject import adapt
from sfedlora.lora.stackable import unstackable_targets
from support.families import FAMILIES
from support.tiny_models import tiny_deberta_classifier, tiny_llama


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "t5-encoder"])
def test_usual_models_give_every_module_whole_batches(name: str) -> None:
    family = FAMILIES[name]
    resident = adapt(family.build(), target_modules="all-linear", rank=2, head_modules=family.head_modules)
    paths = [target.path for target in resident.layout.targets]
    resident.model.config.pad_token_id = 0
    assert unstackable_targets(resident.model, paths) == []
    assert not any(module._forward_pre_hooks for module in resident.model.modules())


def test_modules_that_project_position_embeddings_are_found() -> None:
    resident = adapt(tiny_deberta_classifier(), target_modules="all-linear", rank=2, head_modules=("classifier",))
    paths = [target.path for target in resident.layout.targets]
    found = unstackable_targets(resident.model, paths)
    assert found == [path for path in paths if path.endswith(("query_proj", "key_proj"))]
    assert len(found) == 4
    values = [path for path in paths if path.endswith("value_proj")]
    assert unstackable_targets(resident.model, values) == []


class Router(nn.Module):
    """Sends every other token through an expert."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expert = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = torch.arange(len(tokens)) % 2 == 0
        return tokens.index_put((chosen,), self.expert(tokens[chosen])).view_as(x)


def test_modules_behind_a_router_are_found() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = Router(24)
    resident = adapt(model, target_modules=["q_proj", "expert"], rank=2)
    paths = [target.path for target in resident.layout.targets]
    assert unstackable_targets(resident.model, paths) == ["model.layers.1.mlp.expert"]
