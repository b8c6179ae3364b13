"""The proximal term of FedProx against a plain loop that adds it to the loss, and against its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.peft_oracle import Example, PlainLoop, wrap
from sfedlora.data.batches import plan_local_batches
from sfedlora.federation.client import ClientOutcome, ClientWork, LocalTraining, TrainingSetup, train_client
from sfedlora.federation.state import initial_state, starting_adapter
from sfedlora.seeds import derive_seed
from sfedlora.types import LoraSize, Part, Tensors, part_of, path_of, select_parts
from support.tiny_federation import (
    CLASSIFIER_TARGETS,
    PAD,
    ROUNDS,
    TRAINING,
    adapted,
    random_classes,
    run_all,
    tiny_federation,
)
from support.tiny_models import tiny_bert_classifier

SEED, RANK, SCALING, RATE, MU = 5, 4, 60.0, 0.1, 3.0
DATA, INDICES = random_classes(24), tuple(range(2, 19))
SGD = replace(TRAINING, local_steps=5, proximal_mu=MU)
ANCHORED = {"all": frozenset(Part), "A": frozenset({Part.A}), "head": frozenset({Part.HEAD}), "none": frozenset[Part]()}


def start() -> dict[str, Tensor]:
    resident = adapted("sequence-classification", rank=RANK)
    generator = torch.Generator().manual_seed(3)
    factors = select_parts(resident.read(), [Part.A, Part.B])
    drawn = {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in factors.items()}
    return {**resident.read(), **drawn}


def train(
    training: LocalTraining, anchored: frozenset[Part], trained: frozenset[Part] = frozenset(Part)
) -> ClientOutcome:
    work = ClientWork("ann", 1, start(), trained, LoraSize(RANK, SCALING), RATE, INDICES, {}, anchored)
    resident = adapted("sequence-classification", rank=RANK)
    return train_client(TrainingSetup(resident, DATA, training, "sequence-classification", PAD, SEED), work)


def plain(training: LocalTraining, anchored: frozenset[Part]) -> tuple[dict[str, Tensor], tuple[float, float], float]:
    steps = plan_local_batches(
        DATA.lengths,
        np.asarray(INDICES),
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=None,
        accumulation=training.accumulation,
        seed=derive_seed(SEED, "batches", "ann", 1),
        order_seed=derive_seed(SEED, "order of batches", 1),
    )
    assert DATA.labels is not None
    labels = DATA.labels
    batches = [
        [[Example(DATA.example_tokens(i).tolist(), int(labels[i])) for i in batch] for batch in step] for step in steps
    ]
    model = wrap(
        tiny_bert_classifier(),
        CLASSIFIER_TARGETS,
        rank=RANK,
        scaling=SCALING,
        start=start(),
        head_modules=("classifier",),
    )
    loop = PlainLoop(
        model,
        training.optimizer,
        learning_rate=RATE if training.optimizer == "sgd" else 0.01,
        max_grad_norm=training.max_grad_norm,
        classify=True,
        pad=PAD,
        proximal_mu=training.proximal_mu,
        anchored=[part.value for part in anchored],
    )
    done = loop.run(batches)
    named = {
        f"{kind}:{path}": t
        for kind, own in (("a", done.a), ("b", done.b), ("head", done.head))
        for path, t in own.items()
    }
    return named, done.first_norms, done.mean_loss


def largest(left: Tensors, right: Tensors) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("anchored", ANCHORED)
@pytest.mark.parametrize("clip", [None, 0.3], ids=["free", "clipped"])
def test_training_equals_a_plain_loop_with_the_term_in_its_loss(anchored: str, clip: float | None) -> None:
    training = replace(SGD, max_grad_norm=clip)
    outcome = train(training, ANCHORED[anchored])
    expected, norms, loss = plain(training, ANCHORED[anchored])
    assert outcome.tensors.keys() == expected.keys()
    assert largest(outcome.tensors, expected) < 3e-6
    assert (outcome.metrics.grad_norm_a, outcome.metrics.grad_norm_b) == pytest.approx(norms, rel=1e-5)
    assert outcome.metrics.train_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("part", [Part.A, Part.B, Part.HEAD])
def test_the_term_matters_for_what_it_anchors(part: Part) -> None:
    # The control of the test above: with the term elsewhere, or without mu, the plain loop is told apart.
    free, held = train(SGD, frozenset()).tensors, train(SGD, frozenset({part})).tensors
    assert largest(select_parts(held, [part]), free) > 1e-4
    assert largest(train(replace(SGD, proximal_mu=0.0), frozenset(Part)).tensors, free) == 0.0


def test_a_part_that_is_not_trained_is_not_pulled() -> None:
    outcome = train(SGD, frozenset(Part), frozenset({Part.B, Part.HEAD}))
    assert {part_of(name) for name in outcome.tensors} == {Part.B, Part.HEAD}
    assert outcome.metrics.grad_norm_a is None


def test_a_federation_anchors_what_it_shares_at_what_it_broadcast() -> None:
    training = replace(TRAINING, proximal_mu=10.0)
    one_round = replace(ROUNDS, num_rounds=1)
    federation = tiny_federation(training=training, rounds=one_round)
    state = initial_state(federation)
    begin = starting_adapter(federation, state, "b")
    ran = run_all(federation).states[-1]
    free = run_all(tiny_federation(rounds=one_round)).states[-1]
    moved, moved_free = (
        sum(float((tensor - begin[name]).double().square().sum()) for name, tensor in state.server.shared.items())
        for state in (ran, free)
    )
    assert moved < moved_free  # in all: with B = 0 at the start some A hardly move
    work = ClientWork(
        "b", 1, begin, frozenset(Part), federation.sizes.server, ROUNDS.learning_rate, federation.participants["b"], {},
        frozenset({Part.A}),
    )  # fmt: skip
    setup = TrainingSetup(federation.resident, federation.data, training, "causal-lm", PAD, federation.seed)
    alone = train_client(setup, work)
    own = select_parts(alone.tensors, [Part.B])
    assert all(own[name].equal(ran.personal["b"][name]) for name in own)
    assert {path_of(name) for name in own} == {path_of(name) for name in ran.server.shared}


def test_without_sharing_there_is_nothing_to_anchor() -> None:
    pulled = run_all(tiny_federation(method="local", training=replace(TRAINING, proximal_mu=10.0))).states[-1]
    free = run_all(tiny_federation(method="local")).states[-1]
    assert all(largest(pulled.personal[client], free.personal[client]) == 0.0 for client in free.personal)
