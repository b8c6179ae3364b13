"""What a step of one client costs, in operators and not in seconds, beside a bare loop with stock PEFT.

The differences are written down as they are, so that a change that adds work to every step, layer or client is seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sfedlora.data.encoded import EncodedData, collate
from sfedlora.federation.client import ClientWork, TrainingSetup, train_client
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.round import RoundFinished, evaluate_clients, run_rounds
from sfedlora.federation.state import initial_state
from sfedlora.lora.inject import adapt
from sfedlora.types import LoraSize, Part
from support.counting import CountOperators
from support.stacks import count_passes
from support.tiny_federation import CAUSAL_TARGETS, PAD, ROUNDS, TRAINING, tiny_federation
from support.tiny_models import VOCAB_SIZE, tiny_llama

ADAMW = replace(TRAINING, optimizer="adamw")
VIEWS = {"view", "t", "transpose", "expand", "unsqueeze", "slice", "select", "detach", "alias", "split", "as_strided"}
VIEWS |= {"_unsafe_view", "unbind", "split_with_sizes", "lift_fresh", "squeeze", "permute"}
"""They compute nothing; how many there are is torch's affair."""


def _text() -> EncodedData:
    """24 examples of 8 tokens, labelled from the third on: no batch has padding, which would add a mask."""
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, size=24 * 8, dtype=np.int32)
    return EncodedData(tokens, np.arange(25, dtype=np.int64) * 8, label_starts=np.full(24, 3, dtype=np.int32))


def _computing(counted: CountOperators) -> Counter[str]:
    return Counter(
        {name: count for name, count in counted.counts.items() if name not in VIEWS and "record" not in name}
    )


def _our_step(num_kinds: int) -> Counter[str]:
    """What a round of three steps has more than one of two."""
    resident = adapt(tiny_llama(), target_modules=CAUSAL_TARGETS[:num_kinds], rank=4)
    data, counts = _text(), []
    work = ClientWork("a", 1, resident.read(), frozenset(Part), LoraSize(4, 1.0), 0.01, range(24), {})
    for local_steps in (2, 3):
        setup = TrainingSetup(resident, data, replace(ADAMW, local_steps=local_steps), "causal-lm", PAD, 0)
        with CountOperators() as counted:
            train_client(setup, work)
        counts.append(_computing(counted))
    counts[1].subtract(counts[0])
    return counts[1]


def _bare_step(num_kinds: int) -> Counter[str]:
    """The same with stock PEFT, the model's own loss and a fused AdamW."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=list(CAUSAL_TARGETS[:num_kinds])))
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = collate(_text(), np.arange(4), pad_token_id=PAD)
    for _ in range(2):  # the first makes the moments
        with CountOperators() as counted:
            optimizer.zero_grad()
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
            optimizer.step()
    return _computing(counted)


def test_operators_of_a_step_beside_a_bare_loop() -> None:
    """The labelled rows go to the output head by themselves, gradients are added to flat buffers, and no more."""
    ours, bare = _our_step(3), _bare_step(3)
    products = [sum(step[name] for name in ("mm", "addmm", "bmm")) for step in (ours, bare)]
    assert products[0] == products[1]
    assert (ours["_fused_adamw_"], ours["_local_scalar_dense"]) == (1, bare["_local_scalar_dense"])
    assert ours.total() - bare.total() <= 35


def test_operators_per_layer_beside_a_bare_loop() -> None:
    """Of every pair, the gradients of A and B are added to the flat buffer: two operators."""
    (one, two), (bare_one, bare_two) = [(step(1), step(2)) for step in (_our_step, _bare_step)]
    two.subtract(one)
    bare_two.subtract(bare_one)
    assert two - bare_two == Counter({"add_": 4})


@pytest.mark.parametrize("method", ["fedsa", "fedit"])
def test_forward_passes_of_a_round(method: str) -> None:
    """One for every batch of training; in evaluation clients that serve one model share passes."""
    federation = tiny_federation(method=method, rounds=replace(ROUNDS, num_rounds=1, evaluate_every=1))
    federation = replace(federation, batching=EvalBatching(100, 10_000))
    passes = count_passes(federation.resident)
    [finished] = [
        event for event in run_rounds(federation, initial_state(federation)) if isinstance(event, RoundFinished)
    ]
    assert len(passes) == 4 * 3 + (4 if method == "fedsa" else 1)
    passes.clear()
    list(evaluate_clients(federation, finished.state, "validation", "abcd"))
    assert len(passes) == (4 if method == "fedsa" else 1)
