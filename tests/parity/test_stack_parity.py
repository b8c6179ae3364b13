"""A stack of clients against one client at a time, on every family of the parity suite.

Tolerances, float32: gradients 1e-5 of the largest; 10 steps of AdamW with clipping 1e-5 in relative L2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from sfedlora.federation.client import TrainingSetup
from sfedlora.federation.objective import Task
from sfedlora.lora.inject import ResidentModel, adapt
from sfedlora.types import LoraSize, Part
from support.families import FAMILIES, Family
from support.stacks import Clients, assert_like_alone, count_passes, gradients, setup_of, stacked, work_for
from support.tiny_federation import TRAINING
from support.tiny_models import VOCAB_SIZE

TRAINED = {name: family for name, family in FAMILIES.items() if name != "t5-encoder"}  # that has no task of ours
CLIENTS = Clients(
    ranks=(4, 2, 3, 4, 1),
    num_examples=(9, 7, 12, 2, 5),
    lengths=((4, 9), (5, 12), (40, 60), (3, 5), (6, 30)),
)
ADAMW = replace(TRAINING, optimizer="adamw", local_steps=10, max_grad_norm=0.05, weight_decay=0.01)
every_trained_family = pytest.mark.parametrize("family", TRAINED.values(), ids=TRAINED.keys())


def resident_of(family: Family, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> ResidentModel:
    model = family.build().to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    model.config.pad_token_id = 0
    return adapt(model, target_modules="all-linear", rank=4, dropout=dropout, head_modules=family.head_modules)


def scene(family: Family, *, dropout: float = 0.0) -> TrainingSetup:
    return setup_of(resident_of(family, dropout=dropout), CLIENTS, ADAMW, cast("Task", family.task))


@every_trained_family
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients(family: Family, dropout: float) -> None:
    setup = scene(family, dropout=dropout)
    works = work_for(setup.resident, CLIENTS)
    together = gradients(setup, works)
    for work, found in zip(works, together, strict=True):
        [expected] = gradients(setup, [work])
        for part, gradient in expected.items():
            largest = float(gradient.abs().max())
            assert largest > 1e-7, (work.client_id, part)
            assert float((found[part] - gradient).abs().max()) <= 1e-5 * largest, (work.client_id, part)


@every_trained_family
def test_ten_steps_of_adamw_with_clipping(family: Family) -> None:
    # At a rate of 0.01 the tiny GPT-2 is so curved that a rounding grows tenfold in each step.
    setup = scene(family, dropout=0.2)
    works = work_for(setup.resident, CLIENTS, learning_rate=1e-3)
    passes = count_passes(setup.resident)
    outcomes = stacked(setup, works)
    sizes = {shape[0] if len(shape) == 3 else 1 for shape in passes}
    assert len(sizes) > 1, "the clients of this scene share some passes and not others"
    assert_like_alone(setup, works, outcomes, 1e-5)


def test_the_encoder_of_t5() -> None:
    resident = resident_of(FAMILIES["t5-encoder"])
    works = work_for(resident, CLIENTS)
    ids = torch.randint(3, VOCAB_SIZE, (10, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.arange(10)[:, None] % 7 + 3).long()
    upstream = torch.randn(10, 9, 24, generator=torch.Generator().manual_seed(1))

    def backward(rows: slice) -> None:
        resident.zero_grad()
        output: Tensor = resident.model(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state
        (output * mask[rows, :, None]).backward(upstream[rows])  # type: ignore[no-untyped-call]

    resident.serve_stack([work.start for work in works], sizes=[work.size for work in works], base_deltas={})
    backward(slice(None))
    found = [
        {part: resident.cut_to_rank(part, resident.flat_grad(part, slot), slot) for part in (Part.A, Part.B)}
        for slot in range(5)
    ]
    for slot, work in enumerate(works):
        resident.serve(work.start, size=LoraSize(work.size.rank, work.size.scaling), base_deltas={})
        backward(slice(2 * slot, 2 * slot + 2))
        for part in (Part.A, Part.B):
            expected = resident.flat_grad(part)
            assert float((found[slot][part] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-with-new-pooler", "roberta"])
def test_a_bfloat16_base(name: str) -> None:
    # Another order of sums flips roundings to bfloat16 (1 part in 256) now and then; found here: 0.003 at most.
    family = TRAINED[name]
    resident = resident_of(family, dtype=torch.bfloat16)
    setup = setup_of(resident, CLIENTS, ADAMW, cast("Task", family.task))
    works = work_for(resident, CLIENTS)
    together = gradients(setup, works)
    for work, found in zip(works, together, strict=True):
        [expected] = gradients(setup, [work])
        for part, gradient in expected.items():
            error = float(torch.linalg.vector_norm(found[part] - gradient) / torch.linalg.vector_norm(gradient))
            assert error < 0.02, (work.client_id, part, error)
