"""Local training against a plain loop with stock PEFT and torch.optim on the same batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.peft_oracle import Example, PlainLoop, Trained, wrap
from sfedlora.data.batches import plan_local_batches
from sfedlora.data.encoded import EncodedData
from sfedlora.errors import ClientError
from sfedlora.federation.client import ClientOutcome, ClientWork, LocalTraining, TrainingSetup, train_client
from sfedlora.federation.objective import Task
from sfedlora.seeds import derive_seed
from sfedlora.types import LoraSize, Part, Tensors, part_of, path_of, select_parts
from support.tiny_federation import (
    CAUSAL_TARGETS,
    CLASSIFIER_TARGETS,
    PAD,
    TRAINING,
    adapted,
    random_classes,
    random_text,
)
from support.tiny_models import tiny_bert_classifier, tiny_llama

RANK, SEED = 4, 11
INDICES = tuple(range(2, 19))
DATA: dict[Task, EncodedData] = {"causal-lm": random_text(24), "sequence-classification": random_classes(24)}
SCALING: dict[Task, float] = {"causal-lm": 3.0, "sequence-classification": 60.0}  # the random BERT has tiny gradients
ALL_PARTS = frozenset(Part)
ADAMW = replace(TRAINING, optimizer="adamw", local_steps=4)
SGD = replace(TRAINING, local_steps=4)
RATES = {"adamw": 0.01, "sgd": 0.3}

CASES: dict[str, tuple[LocalTraining, frozenset[Part]]] = {
    "sgd": (SGD, ALL_PARTS),
    "sgd, weight decay": (replace(SGD, weight_decay=0.1), ALL_PARTS),
    "sgd, clipping": (replace(SGD, max_grad_norm=0.02), ALL_PARTS),
    "sgd, accumulation": (replace(SGD, accumulation=3), ALL_PARTS),
    "sgd, slow A": (replace(SGD, learning_rate_a_ratio=0.1), ALL_PARTS),
    "sgd, standing A": (replace(SGD, learning_rate_a_ratio=0.0), ALL_PARTS),
    "sgd, frozen A": (SGD, frozenset({Part.B, Part.HEAD})),
    "sgd, frozen A, clipping": (replace(SGD, max_grad_norm=0.02), frozenset({Part.B, Part.HEAD})),
    "sgd, epochs": (replace(SGD, local_steps=None, local_epochs=2), ALL_PARTS),
    "sgd, epochs, accumulation": (replace(SGD, local_steps=None, local_epochs=1, accumulation=3), ALL_PARTS),
    "adamw": (ADAMW, ALL_PARTS),
    "adamw, weight decay": (replace(ADAMW, weight_decay=0.1), ALL_PARTS),
    "adamw, clipping": (replace(ADAMW, max_grad_norm=0.02), ALL_PARTS),
    "adamw, accumulation": (replace(ADAMW, accumulation=3), ALL_PARTS),
    "adamw, fast A": (replace(ADAMW, learning_rate_a_ratio=4.0), ALL_PARTS),
    "adamw, frozen A": (ADAMW, frozenset({Part.B, Part.HEAD})),
}
every_task = pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])


def starting_point(task: Task) -> dict[str, Tensor]:
    """Factors with B away from zero, so that both gradients are."""
    resident = adapted(task, rank=RANK)
    generator = torch.Generator().manual_seed(3)
    drawn = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in select_parts(resident.read(), [Part.A, Part.B]).items()
    }
    return {**resident.read(), **drawn}


def work_of(
    task: Task,
    training: LocalTraining,
    trained: frozenset[Part] = ALL_PARTS,
    *,
    start: Tensors | None = None,
    round_num: int = 1,
    moments: Tensors | None = None,
) -> ClientWork:
    return ClientWork(
        client_id="ann",
        round_num=round_num,
        start=starting_point(task) if start is None else start,
        trained=trained,
        size=LoraSize(RANK, SCALING[task]),
        learning_rate=RATES[training.optimizer],
        indices=INDICES,
        optimizer_state={} if moments is None else moments,
    )


def train(task: Task, training: LocalTraining, work: ClientWork) -> ClientOutcome:
    resident = adapted(task, rank=RANK)
    return train_client(TrainingSetup(resident, DATA[task], training, task, PAD, SEED), work)


def examples(task: Task, training: LocalTraining, round_num: int = 1) -> list[list[list[Example]]]:
    """The same batches, as plain lists."""
    data = DATA[task]
    steps = plan_local_batches(
        data.lengths,
        INDICES,
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        accumulation=training.accumulation,
        seed=derive_seed(SEED, "batches", "ann", round_num),
        order_seed=derive_seed(SEED, "order of batches", round_num),
    )
    labels = data.labels if data.label_starts is None else data.label_starts
    assert labels is not None
    return [
        [[Example(data.example_tokens(i).tolist(), int(labels[i])) for i in batch] for batch in step] for step in steps
    ]


def plain_loop(task: Task, training: LocalTraining, trained: frozenset[Part], start: Tensors) -> PlainLoop:
    classify = task == "sequence-classification"
    model = wrap(
        tiny_bert_classifier() if classify else tiny_llama(),
        CLASSIFIER_TARGETS if classify else CAUSAL_TARGETS,
        rank=RANK,
        scaling=SCALING[task],
        start=start,
        head_modules=("classifier",) if classify else (),
    )
    return PlainLoop(
        model,
        training.optimizer,
        learning_rate=RATES[training.optimizer],
        a_ratio=training.learning_rate_a_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        train_a=Part.A in trained,
        classify=classify,
        pad=PAD,
    )


def named(result: Trained) -> dict[str, Tensor]:
    return {
        **{f"a:{path}": tensor for path, tensor in result.a.items()},
        **{f"b:{path}": tensor for path, tensor in result.b.items()},
        **{f"head:{path}": tensor for path, tensor in result.head.items()},
    }


def distance(outcome: Tensors, expected: Tensors, start: Tensors) -> float:
    """Largest deviation in units of the largest change that training made, over the parts."""
    worst = 0.0
    for part in {part_of(name) for name in outcome}:
        names = [name for name in outcome if part_of(name) is part]
        moved = max(float((expected[name] - start[name]).abs().max()) for name in names)
        size = max(float(expected[name].abs().max()) for name in names)
        wrong = max(float((outcome[name] - expected[name]).abs().max()) for name in names)
        assert moved > 3e-4 * size or wrong == 0, f"part {part} hardly moved, so nothing is compared"
        worst = max(worst, wrong / max(moved, size))
    return worst


@every_task
@pytest.mark.parametrize("case", CASES)
def test_training_equals_a_plain_loop(case: str, task: Task) -> None:
    training, trained = CASES[case]
    work = work_of(task, training, trained)
    outcome = train(task, training, work)
    steps = examples(task, training)
    expected = plain_loop(task, training, trained, work.start).run(steps)
    assert {part_of(name) for name in outcome.tensors} == trained & {part_of(name) for name in work.start}
    assert distance(outcome.tensors, named(expected), work.start) < 1e-5
    assert outcome.metrics.num_steps == len(steps)
    assert outcome.metrics.train_loss == pytest.approx(expected.mean_loss, rel=1e-5)
    assert outcome.metrics.grad_norm_b == pytest.approx(expected.first_norms[1], rel=1e-5)
    if Part.A in trained:
        assert outcome.metrics.grad_norm_a == pytest.approx(expected.first_norms[0], rel=1e-5)
    else:
        assert outcome.metrics.grad_norm_a is None


@every_task
def test_clipping_really_clips(task: Task) -> None:
    # The control of the clipping cases: the first norm, recorded before clipping, is above the threshold.
    metrics = train(task, SGD, work_of(task, SGD)).metrics
    assert metrics.grad_norm_a is not None
    assert metrics.grad_norm_b is not None
    assert math.hypot(metrics.grad_norm_a, metrics.grad_norm_b) > 0.02


@every_task
@pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_keeping_the_optimizer_state_is_an_uninterrupted_optimizer(task: Task, training: LocalTraining) -> None:
    keeping = replace(training, keep_optimizer_state=True)
    start = starting_point(task)
    moments: Tensors = {}
    tensors: Tensors = start
    oracle = plain_loop(task, training, ALL_PARTS, start)
    for round_num in (1, 2, 3):
        work = work_of(task, keeping, start=tensors, round_num=round_num, moments=moments)
        outcome = train(task, keeping, work)
        expected = named(oracle.run(examples(task, training, round_num)))
        assert distance(outcome.tensors, expected, start) < 2e-5
        tensors, moments = outcome.tensors, outcome.optimizer_state
    assert bool(moments) == (training.optimizer == "adamw")


def test_resetting_is_another_thing_than_keeping() -> None:
    start = starting_point("causal-lm")
    first = train("causal-lm", ADAMW, work_of("causal-lm", ADAMW, start=start))
    keeping = replace(ADAMW, keep_optimizer_state=True)
    kept = train("causal-lm", keeping, work_of("causal-lm", keeping, start=start))
    assert first.optimizer_state == {}
    assert kept.tensors.keys() == first.tensors.keys()
    assert all(kept.tensors[name].equal(first.tensors[name]) for name in first.tensors)
    again = work_of("causal-lm", keeping, start=kept.tensors, round_num=2, moments=kept.optimizer_state)
    reset = replace(again, optimizer_state={})
    one, two = train("causal-lm", keeping, again).tensors, train("causal-lm", keeping, reset).tensors
    assert max(float((one[name] - two[name]).abs().max()) for name in one) > 1e-3


@every_task
def test_an_outcome_depends_on_its_own_work_only(task: Task) -> None:
    # The resident model serves other clients in between, one of them with A frozen, one that fails.
    alone = train(task, ADAMW, work_of(task, ADAMW))
    resident = adapted(task, rank=RANK)

    def run(work: ClientWork) -> ClientOutcome:
        return train_client(TrainingSetup(resident, DATA[task], ADAMW, task, PAD, SEED), work)

    run(replace(work_of(task, ADAMW, frozenset({Part.B, Part.HEAD})), client_id="bob", size=LoraSize(RANK, 9.0)))
    with pytest.raises(ClientError):
        run(replace(work_of(task, ADAMW), client_id="cyd", size=LoraSize(RANK, float("inf"))))
    after = run(work_of(task, ADAMW))
    assert list(after.tensors) == list(alone.tensors)
    assert all(after.tensors[name].equal(alone.tensors[name]) for name in alone.tensors)
    assert after.metrics == alone.metrics


def test_work_is_not_mutated_and_outcomes_are_copies() -> None:
    work = work_of("causal-lm", SGD)
    before = {name: tensor.clone() for name, tensor in work.start.items()}
    resident = adapted(rank=RANK)
    outcome = train_client(TrainingSetup(resident, DATA["causal-lm"], SGD, "causal-lm", PAD, SEED), work)
    kept = {name: tensor.clone() for name, tensor in outcome.tensors.items()}
    resident.flat(Part.A).fill_(0.0)
    resident.flat(Part.B).fill_(0.0)
    assert all(work.start[name].equal(before[name]) for name in before)
    assert all(outcome.tensors[name].equal(kept[name]) for name in kept)


def test_batches_depend_on_the_client_and_the_round() -> None:
    work = work_of("causal-lm", SGD)
    variants = [work, replace(work, client_id="bob"), replace(work, round_num=2)]
    results = [train("causal-lm", SGD, variant).tensors for variant in variants]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert any(not results[one][name].equal(results[two][name]) for name in results[0])


def test_tokens_are_counted_by_hand() -> None:
    outcome = train("causal-lm", SGD, work_of("causal-lm", SGD))
    lengths = [[len(example.tokens) for example in batch] for step in examples("causal-lm", SGD) for batch in step]
    assert outcome.metrics.tokens == sum(map(sum, lengths))
    assert outcome.metrics.padded_tokens == sum(len(batch) * max(batch) - sum(batch) for batch in lengths)
    assert outcome.num_examples == len(INDICES)


@every_task
def test_dropout_is_drawn_from_seeds_and_only_while_training(task: Task) -> None:
    resident = adapted(task, rank=RANK, dropout=0.3)

    def run(seed: int) -> Tensors:
        work = work_of(task, SGD)
        return train_client(TrainingSetup(resident, DATA[task], SGD, task, PAD, seed), work).tensors

    one = run(SEED)
    torch.manual_seed(99)
    two = run(SEED)
    assert all(one[name].equal(two[name]) for name in one)
    without = train(task, SGD, work_of(task, SGD)).tensors
    assert any(not one[name].equal(without[name]) for name in one)
    assert resident.dropout.seeds is None


def poisoned(value: float) -> dict[str, Tensor]:
    start = starting_point("causal-lm")
    name = next(name for name in start if part_of(name) is Part.B)
    start[name] = torch.full_like(start[name], value)
    return start


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "overflow"])
def test_a_loss_that_is_not_finite_names_client_round_and_stage(value: float) -> None:
    work = replace(work_of("causal-lm", SGD, start=poisoned(value), round_num=3), client_id="ann")
    with pytest.raises(
        ClientError, match=r"client 'ann', round 3, training: .*(NaN|infinite).*local step [12];"
    ) as caught:
        train("causal-lm", SGD, work)
    assert (caught.value.client_id, caught.value.round_num, caught.value.stage) == ("ann", 3, "training")


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_an_infinite_gradient_is_an_error_and_not_clipped_to_zero(max_grad_norm: float | None) -> None:
    training = replace(SGD, max_grad_norm=max_grad_norm)
    start = {
        name: torch.zeros_like(t) if part_of(name) is Part.B else t for name, t in starting_point("causal-lm").items()
    }
    work = replace(
        work_of("causal-lm", training, start=start), size=LoraSize(RANK, 1e35)
    )  # with B at zero the loss is finite
    with pytest.raises(ClientError, match="the gradient became NaN or infinite at local step 1;"):
        train("causal-lm", training, work)


def test_a_gradient_that_overflows_later_names_its_step() -> None:
    training = replace(SGD, max_grad_norm=1.0, proximal_mu=1e30)
    work = replace(work_of("causal-lm", training), anchored=frozenset({Part.A, Part.B}))
    with pytest.raises(ClientError, match="the gradient became NaN or infinite at local step 2;"):
        train("causal-lm", training, work)


def test_a_factor_that_overflows_is_an_error() -> None:
    decaying = replace(SGD, local_steps=1, weight_decay=1e3)
    work = replace(work_of("causal-lm", decaying), learning_rate=3e38)
    with pytest.raises(ClientError, match="trained factor or its gradient"):
        train("causal-lm", decaying, work)


def test_factors_are_named_by_module_path() -> None:
    outcome = train("sequence-classification", SGD, work_of("sequence-classification", SGD))
    assert {path_of(name) for name in outcome.tensors if part_of(name) is Part.HEAD} == {
        "classifier.weight",
        "classifier.bias",
    }
    layers = [f"bert.encoder.layer.{layer}.attention.self.{kind}" for layer in (0, 1) for kind in ("query", "value")]
    assert [name for name in outcome.tensors if part_of(name) is Part.A] == [f"a:{path}" for path in layers]


def test_a_client_with_few_examples_trains_on_all_of_them() -> None:
    work = replace(work_of("causal-lm", SGD), indices=(5,))
    outcome = train("causal-lm", SGD, work)
    assert outcome.num_examples == 1
    assert outcome.metrics.tokens == 4 * int(np.diff(DATA["causal-lm"].offsets)[5])
