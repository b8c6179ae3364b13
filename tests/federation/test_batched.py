"""Several clients in one forward pass: each gets what it gets alone, whatever the others are or do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from federation.peft_oracle import Example, PlainLoop, Trained, wrap
from sfedlora.data.batches import plan_local_batches
from sfedlora.errors import AdapterError, ClientError
from sfedlora.federation.client import (
    ClientOutcome,
    ClientWork,
    LocalTraining,
    TrainingSetup,
    train_client,
    train_clients,
)
from sfedlora.federation.objective import Task
from sfedlora.federation.runners.batched import BatchedRunner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.lora import resident
from sfedlora.lora.inject import adapt
from sfedlora.lora.layer import LoraLinear
from sfedlora.seeds import derive_seed
from sfedlora.types import Part, part_of
from support.counting import CountOperators
from support.stacks import (
    Clients,
    assert_like_alone,
    count_passes,
    relative_error,
    setup_of,
    stacked,
    succeeded,
    work_for,
)
from support.tiny_federation import CAUSAL_TARGETS, CLASSIFIER_TARGETS, PAD, TRAINING, adapted
from support.tiny_models import tiny_bert_classifier, tiny_llama

TASKS: tuple[Task, ...] = ("causal-lm", "sequence-classification")
every_task = pytest.mark.parametrize("task", TASKS)
ALL = frozenset(Part)
MIXED = Clients(
    ranks=(4, 2, 3, 4, 1),
    num_examples=(9, 3, 13, 2, 6),
    lengths=((4, 9), (5, 12), (40, 60), (3, 5), (6, 30)),
)
"""Ranks, lengths and numbers of examples differ; `b` and `d` have fewer than a batch of 4."""
ALIKE = Clients(ranks=(4, 4, 4, 4), num_examples=(8, 8, 8, 8), lengths=((12, 12),) * 4)
ADAMW = replace(TRAINING, optimizer="adamw", local_steps=4)
EPOCHS = replace(ADAMW, local_steps=None, local_epochs=2)


def scene(
    task: Task, training: LocalTraining, clients: Clients = MIXED, *, dropout: float = 0.0
) -> tuple[TrainingSetup, list[ClientWork]]:
    model = adapted(task, rank=4, dropout=dropout)
    scaling = 2.0 if task == "causal-lm" else 40.0  # the random BERT has tiny gradients
    rate = 1e-3 if training.optimizer == "adamw" else 0.3
    works = work_for(model, clients, learning_rate=rate, scaling=scaling)
    return setup_of(model, clients, training, task), works


CASES: dict[str, LocalTraining] = {
    "sgd": TRAINING,
    "sgd, weight decay": replace(TRAINING, weight_decay=0.1),
    "sgd, clipping": replace(TRAINING, max_grad_norm=0.02),
    "sgd, slow A": replace(TRAINING, learning_rate_a_ratio=0.1),
    "sgd, accumulation": replace(TRAINING, accumulation=3),
    "adamw": ADAMW,
    "adamw, weight decay": replace(ADAMW, weight_decay=0.1),
    "adamw, clipping": replace(ADAMW, max_grad_norm=0.02),
    "adamw, unequal numbers of steps": EPOCHS,
    "adamw, unequal numbers of micro-batches": replace(EPOCHS, accumulation=2),
    "sgd, unequal numbers of micro-batches": replace(EPOCHS, optimizer="sgd", accumulation=3),
    "proximal term": replace(TRAINING, proximal_mu=3.0),
    "moments kept": replace(ADAMW, keep_optimizer_state=True),
}


@every_task
@pytest.mark.parametrize(("case", "dropout"), [("sgd", 0.0), ("adamw", 0.0), *((case, 0.3) for case in CASES)])
def test_every_client_gets_what_it_gets_alone(case: str, dropout: float, task: Task) -> None:
    setup, works = scene(task, CASES[case], dropout=dropout)
    if CASES[case].proximal_mu:
        works = [replace(work, anchored=frozenset({Part.A, Part.B})) for work in works]
    passes = count_passes(setup.resident)
    outcomes = stacked(setup, works)
    assert {len(shape) for shape in passes} == {2, 3}, "some passes of one client, some of several"
    assert_like_alone(setup, works, outcomes, 3e-6)


@every_task
@pytest.mark.parametrize(
    "trained", [{Part.B, Part.HEAD}, {Part.A, Part.HEAD}, {Part.B}], ids=lambda parts: "+".join(sorted(parts))
)
def test_frozen_parts(trained: set[Part], task: Task) -> None:
    setup, works = scene(task, ADAMW)
    works = [replace(work, trained=frozenset(trained)) for work in works]
    assert_like_alone(setup, works, stacked(setup, works), 3e-6)


def test_parts_may_be_trained_in_turns() -> None:
    # As RoLoRA does: the views of the same stack, first with A frozen, then with B.
    setup, works = scene("causal-lm", ADAMW, ALIKE)
    for trained in ({Part.B}, {Part.A, Part.B}, {Part.A}, {Part.A, Part.B}):
        turn = [replace(work, trained=frozenset(trained)) for work in works]
        outcomes = stacked(setup, turn)
        frozen = {Part.A, Part.B} - trained
        assert not any(setup.resident.flat_grad(part, slot).any() for part in frozen for slot in range(4))
        assert_like_alone(setup, turn, outcomes, 3e-6)


def test_masks_have_the_address_of_client_round_step_and_micro_batch() -> None:
    setup, works = scene("causal-lm", replace(EPOCHS, local_epochs=1, accumulation=2), dropout=0.1)
    seen: set[int] = set()
    layer = setup.resident.model.get_submodule(setup.resident.layout.targets[0].path)
    layer.register_forward_pre_hook(lambda *_: seen.update(setup.resident.dropout.seeds or ()))
    stacked(setup, [replace(work, round_num=3) for work in works])
    expected = {
        derive_seed(setup.seed, "dropout", work.client_id, 3, step, micro)
        for work in works
        for step, micro_batches in enumerate(examples_of(setup, replace(work, round_num=3)))
        for micro, _ in enumerate(micro_batches)
    }
    assert len(expected) == 3 + 1 + 4 + 1 + 2
    assert expected <= seen  # a pass may include a client that has no batch in it


def examples_of(setup: TrainingSetup, work: ClientWork) -> list[list[list[Example]]]:
    """The client's batches as plain lists, planned from the documented addresses of their seeds."""
    data, training = setup.data, setup.training
    steps = plan_local_batches(
        data.lengths,
        work.indices,
        batch_size=training.batch_size,
        local_steps=training.local_steps,
        local_epochs=training.local_epochs,
        accumulation=training.accumulation,
        seed=derive_seed(setup.seed, "batches", work.client_id, work.round_num),
        order_seed=derive_seed(setup.seed, "order of batches", work.round_num),
    )
    labels = data.labels if data.label_starts is None else data.label_starts
    assert labels is not None
    return [
        [[Example(data.example_tokens(i).tolist(), int(labels[i])) for i in batch] for batch in step] for step in steps
    ]


@every_task
def test_a_stack_equals_plain_loops_with_stock_peft(task: Task) -> None:
    training = replace(EPOCHS, accumulation=2, max_grad_norm=0.05, weight_decay=0.1)
    setup, works = scene(task, training)
    classify = task == "sequence-classification"
    for work, outcome in zip(works, stacked(setup, works), strict=True):
        model = wrap(
            tiny_bert_classifier() if classify else tiny_llama(),
            CLASSIFIER_TARGETS if classify else CAUSAL_TARGETS,
            rank=work.size.rank,
            scaling=work.size.scaling,
            start=work.start,
            head_modules=("classifier",) if classify else (),
        )
        loop = PlainLoop(
            model,
            "adamw",
            learning_rate=work.learning_rate,
            weight_decay=0.1,
            max_grad_norm=0.05,
            classify=classify,
            pad=PAD,
        )
        expected = loop.run(examples_of(setup, work))
        assert relative_error(outcome.tensors, named(expected)) < 1e-5
        assert outcome.metrics.train_loss == pytest.approx(expected.mean_loss, rel=1e-5)
        assert outcome.metrics.grad_norm_a == pytest.approx(expected.first_norms[0], rel=1e-4)
        assert outcome.metrics.grad_norm_b == pytest.approx(expected.first_norms[1], rel=1e-4)


def named(result: Trained) -> dict[str, Tensor]:
    return {
        **{f"a:{path}": tensor for path, tensor in result.a.items()},
        **{f"b:{path}": tensor for path, tensor in result.b.items()},
        **{f"head:{path}": tensor for path, tensor in result.head.items()},
    }


@every_task
def test_kept_moments_over_several_rounds_with_ranks_of_their_own(task: Task) -> None:
    training = replace(EPOCHS, local_epochs=1, keep_optimizer_state=True)
    setup, together = scene(task, training, dropout=0.1)
    alone = together
    for round_num in (1, 2, 3):
        outcomes = stacked(setup, together)
        for work, outcome in zip(alone, outcomes, strict=True):
            expected = train_client(setup, work)
            assert relative_error(outcome.tensors, expected.tensors) < 1e-5
            assert outcome.optimizer_state.keys() == expected.optimizer_state.keys()
            for key, value in expected.optimizer_state.items():
                assert outcome.optimizer_state[key].shape == value.shape
                torch.testing.assert_close(outcome.optimizer_state[key], value, rtol=1e-3, atol=1e-6)
        steps = [int(outcome.optimizer_state["b/step"]) for outcome in outcomes]
        assert steps == [round_num * number for number in (3, 1, 4, 1, 2)]
        alone = [next_round(work, train_client(setup, work)) for work in alone]
        together = [next_round(work, outcome) for work, outcome in zip(together, outcomes, strict=True)]


def next_round(work: ClientWork, outcome: ClientOutcome) -> ClientWork:
    """The work that goes on from an outcome."""
    return replace(
        work, start=outcome.tensors, optimizer_state=outcome.optimizer_state, round_num=outcome.round_num + 1
    )


def base_deltas(setup: TrainingSetup, form: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    deltas: dict[str, Tensor] = {}
    for target in setup.resident.layout.targets:
        shapes = {"left": (target.out_features, 3), "right": (3, target.in_features)}
        if form == "whole":
            shapes = {"full": (target.out_features, target.in_features)}
        for piece, shape in shapes.items():
            deltas[f"delta_{piece}:{target.path}"] = torch.randn(shape, generator=generator) * 0.1
    return deltas


@every_task
@pytest.mark.parametrize("form", ["factors", "whole"])
def test_base_deltas(form: str, task: Task) -> None:
    setup, works = scene(task, ADAMW, dropout=0.2)
    plain = stacked(setup, works)
    works = [replace(work, base_deltas=base_deltas(setup, form)) for work in works]
    outcomes = stacked(setup, works)
    assert relative_error(outcomes[0].tensors, plain[0].tensors) > 1e-4, "the deltas change what is learnt"
    assert_like_alone(setup, works, outcomes, 3e-6)


@every_task
def test_gradient_checkpointing_draws_the_same_masks_again(task: Task) -> None:
    setup, works = scene(task, EPOCHS, dropout=0.3)
    before = stacked(setup, works)
    setup.resident.enable_gradient_checkpointing()
    passes = count_passes(setup.resident)
    after = stacked(setup, works)
    assert len(passes) % 2 == 0
    assert all(passes.count(shape) % 2 == 0 for shape in passes), "every pass was computed twice"
    for one, two in zip(before, after, strict=True):
        assert all(two.tensors[name].equal(one.tensors[name]) for name in one.tensors)


def test_a_stack_leaves_no_trace() -> None:
    # The next clients, of whatever number and rank, get the bits of a fresh model.
    setup, works = scene("sequence-classification", ADAMW, dropout=0.2)
    fresh = train_client(setup, works[1])
    stacked(setup, works)
    layer = setup.resident.model.get_submodule(setup.resident.layout.targets[0].path)
    assert isinstance(layer, LoraLinear)
    assert layer.a.shape[0] == 5, "all are active again, whoever the last pass was for"
    stacked(setup, works[:2])
    again = train_client(setup, works[1])
    assert all(again.tensors[name].equal(fresh.tensors[name]) for name in fresh.tensors)
    assert again.metrics == fresh.metrics
    dropout = setup.resident.dropout
    assert (dropout.seeds, dropout.own_shapes, dropout.padded_shape) == (None, None, (0, 0))


def test_the_bits_of_a_stack_do_not_depend_on_what_ran_before() -> None:
    setup, works = scene("causal-lm", EPOCHS)
    first = stacked(setup, works)
    train_client(setup, works[3])
    stacked(setup, works[::-1])
    second = stacked(setup, works)
    for one, two in zip(first, second, strict=True):
        assert all(two.tensors[name].equal(one.tensors[name]) for name in one.tensors)
        assert one.metrics == two.metrics


def test_views_that_are_made_anew_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, works = scene("causal-lm", EPOCHS)
    kept = stacked(setup, works)
    monkeypatch.setattr(resident, "MAX_KEPT_VIEWS", 1)
    anew = stacked(setup, works)
    for one, two in zip(kept, anew, strict=True):
        assert all(two.tensors[name].equal(one.tensors[name]) for name in one.tensors)


def test_work_is_not_changed_and_outcomes_are_copies() -> None:
    setup, works = scene("sequence-classification", replace(ADAMW, keep_optimizer_state=True))
    before = [{name: tensor.clone() for name, tensor in work.start.items()} for work in works]
    outcomes = stacked(setup, works)
    kept = [{name: tensor.clone() for name, tensor in outcome.tensors.items()} for outcome in outcomes]
    moments = [{name: tensor.clone() for name, tensor in outcome.optimizer_state.items()} for outcome in outcomes]
    stacked(setup, works[::-1])
    for work, outcome, start, tensors, state in zip(works, outcomes, before, kept, moments, strict=True):
        assert all(work.start[name].equal(start[name]) for name in start)
        assert all(outcome.tensors[name].equal(tensors[name]) for name in tensors)
        assert all(outcome.optimizer_state[name].equal(state[name]) for name in state)


# clients that fail


def spoil(work: ClientWork, value: float) -> ClientWork:
    name = next(name for name in work.start if part_of(name) is Part.B)
    return replace(work, start={**work.start, name: torch.full_like(work.start[name], value)})


@every_task
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_a_client_that_is_not_finite_fails_alone(value: float, task: Task) -> None:
    setup, works = scene(task, replace(EPOCHS, max_grad_norm=0.05), dropout=0.1)
    works[2] = spoil(works[2], value)
    results = train_clients(setup, works)
    with pytest.raises(ClientError) as alone:
        train_client(setup, works[2])
    failed = results.pop(2)
    assert isinstance(failed, ClientError)
    assert (failed.client_id, failed.reason) == ("c", alone.value.reason)
    assert "NaN or infinite" in failed.reason
    assert failed.__traceback__ is None, "a traceback would hold the stack in memory"
    assert_like_alone(setup, works[:2] + works[3:], [succeeded(result) for result in results], 3e-6)


def test_a_client_that_fails_in_a_later_step_fails_alone() -> None:
    setup, works = scene("causal-lm", replace(TRAINING, local_steps=3, max_grad_norm=1.0, proximal_mu=1.0))
    works[1] = replace(works[1], anchored=frozenset({Part.A, Part.B}), learning_rate=1e30)
    results = train_clients(setup, works)
    failed = results.pop(1)
    assert isinstance(failed, ClientError)
    assert "local step 2;" in failed.reason
    assert_like_alone(setup, works[:1] + works[2:], [succeeded(result) for result in results], 3e-6)


def test_all_clients_may_fail() -> None:
    setup, works = scene("causal-lm", ADAMW)
    results = train_clients(setup, [spoil(work, math.nan) for work in works])
    assert [type(result) for result in results] == [ClientError] * 5
    assert_like_alone(setup, works, stacked(setup, works), 3e-6)


def test_moments_of_another_size_fail_their_client_alone() -> None:
    setup, works = scene("causal-lm", replace(ADAMW, keep_optimizer_state=True))
    works = [next_round(work, outcome) for work, outcome in zip(works, stacked(setup, works), strict=True)]
    works[1] = replace(works[1], optimizer_state=works[0].optimizer_state)
    results = train_clients(setup, works)
    failed = results.pop(1)
    assert isinstance(failed, ClientError)
    size = setup.resident.layout.shapes(2, [Part.A])
    elements = sum(torch.Size(shape).numel() for shape in size.values())
    assert failed.reason == f"kept a/exp_avg has shape ({2 * elements},), expected ({elements},)"
    assert_like_alone(setup, works[:1] + works[2:], [succeeded(result) for result in results], 1e-5)


# the runner


def limit_memory(setup: TrainingSetup, most_clients: int, message: str | None = None) -> list[int]:
    """From now on a pass of more clients raises what torch raises; returns the sizes of the passes that were tried."""
    tried: list[int] = []

    def check(layer: nn.Module, _: object) -> None:
        assert isinstance(layer, LoraLinear)
        num_clients = layer.a.shape[0] if layer.a.ndim == 3 else 1
        tried.append(num_clients)
        if num_clients > most_clients:
            raise torch.OutOfMemoryError("CUDA out of memory") if message is None else RuntimeError(message)

    layer = setup.resident.model.get_submodule(setup.resident.layout.targets[-1].path)
    layer.register_forward_pre_hook(check)
    return tried


def many(number: int) -> Clients:
    return Clients((4,) * number, (8,) * number, ((12, 12),) * number)


@pytest.mark.parametrize("message", [None, "DefaultCPUAllocator: can't allocate memory"], ids=["cuda", "cpu"])
def test_a_stack_that_memory_does_not_hold_is_halved_once_and_for_all(message: str | None) -> None:
    setup, works = scene("causal-lm", replace(ADAMW, local_steps=2), many(20), dropout=0.1)
    tried = limit_memory(setup, 3, message)
    runner = BatchedRunner(setup, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [succeeded(result) for result in runner.run_cohort(works)]
    assert [str(warning.message).split("(")[0] for warning in caught] == [
        "16 clients in one batch do not fit into memory ",
        "8 clients in one batch do not fit into memory ",
        "4 clients in one batch do not fit into memory ",
    ]
    assert str(caught[-1].message).endswith("; going on with 2")
    assert runner.clients_per_batch == 2
    assert tried == [16, 8, 4, *[2] * 20], "the new number is used from then on: two steps of ten pairs"
    assert [result.client_id for result in results] == [work.client_id for work in works]
    assert_like_alone(setup, works, results, 3e-6)


def test_memory_that_holds_no_client_excludes_them_by_name() -> None:
    setup, works = scene("causal-lm", ADAMW, many(3))
    limit_memory(setup, 0)
    runner = BatchedRunner(setup, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = list(runner.run_cohort(works))
    assert len(caught) == 2
    assert runner.clients_per_batch == 1
    assert [(type(result), result.client_id) for result in results] == [(ClientError, name) for name in "abc"]
    assert all("OutOfMemoryError" in result.reason for result in results if isinstance(result, ClientError))


def test_memory_that_fails_while_buffers_are_made_leaves_a_model_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, works = scene("sequence-classification", ADAMW, ALIKE)
    alone = [train_client(setup, work) for work in works]
    zeros = torch.zeros
    for allowed in range(3):  # buffers of A, B and head
        setup.resident.resize(4)
        calls = 0

        def failing(*shape: int, allowed: int = allowed, **options: object) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return zeros(*shape, **options)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(torch, "zeros", failing)
        with pytest.raises(torch.OutOfMemoryError):
            train_clients(setup, works)
        monkeypatch.setattr(torch, "zeros", zeros)
        assert_like_alone(setup, works, stacked(setup, works), 3e-6)
        for work, expected in zip(works, alone, strict=True):
            found = train_client(setup, work)
            assert all(found.tensors[name].equal(expected.tensors[name]) for name in expected.tensors)


def test_another_error_of_torch_is_the_error_of_the_client_that_causes_it() -> None:
    setup, works = scene("causal-lm", ADAMW, ALIKE)
    name = f"a:{setup.resident.layout.targets[-1].path}"
    works[2] = replace(works[2], start={**works[2].start, name: torch.full_like(works[2].start[name], 7.0)})

    def check(layer: nn.Module, _: object) -> None:
        assert isinstance(layer, LoraLinear)
        if bool(torch.eq(layer.a, 7.0).any()):
            raise RuntimeError("a broken kernel\nand a long explanation")

    setup.resident.model.get_submodule(name.removeprefix("a:")).register_forward_pre_hook(check)
    runner = BatchedRunner(setup, 4)
    results = list(runner.run_cohort(works))
    assert runner.clients_per_batch == 4, "that was not memory"
    failed = results.pop(2)
    assert isinstance(failed, ClientError)
    assert (failed.client_id, failed.reason) == ("c", "RuntimeError: a broken kernel")
    assert_like_alone(setup, works[:2] + works[3:], [succeeded(result) for result in results], 3e-6)


def test_a_model_that_gives_a_layer_part_of_a_batch_is_refused() -> None:
    # As a mixture of experts would, whose router sends each token elsewhere: nobody knows whose rows these are.
    setup, works = scene("causal-lm", ADAMW, ALIKE)
    layer = setup.resident.model.get_submodule(setup.resident.layout.targets[-1].path)
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][:8],))
    with pytest.raises(AdapterError, match=r"8 rows for a stack of 4 clients with 4 x 12 tokens .* runner: serial"):
        list(BatchedRunner(setup, 4).run_cohort(works))


def test_adapters_that_do_not_fit_the_model_stop_the_run() -> None:
    setup, works = scene("causal-lm", ADAMW, ALIKE)
    name = next(iter(works[1].start))
    works[1] = replace(works[1], start={**works[1].start, name: torch.zeros(4, 5)})
    for runner in (BatchedRunner(setup, 4), SerialRunner(setup)):
        with pytest.raises(AdapterError, match=r"shape \(4, 5\)"):
            list(runner.run_cohort(works))


COHORT = {"a": range(9), "b": range(9, 12), "c": range(12, 25), "d": range(25, 27), "e": range(27, 33)}


@pytest.mark.parametrize("training", [TRAINING, EPOCHS], ids=["steps", "epochs"])
def test_the_order_puts_like_clients_together(training: LocalTraining) -> None:
    setup, _ = scene("causal-lm", training)
    order = BatchedRunner(setup, 2).order(COHORT)
    assert sorted(order) == list("abcde")
    lengths = {client: setup.data.lengths[list(rows)].mean() for client, rows in COHORT.items()}
    if training is TRAINING:  # batches of 4, but for `b` and `d` that have 3 and 2 examples
        assert order == [*sorted("ace", key=lengths.__getitem__), "b", "d"]
    else:  # 3, 1, 4, 1 and 2 batches
        assert order == ["c", "a", "e", "b", "d"]
    assert BatchedRunner(setup, 2).order(dict(reversed(COHORT.items()))) == order


def test_finished_stacks_are_left_out_and_others_stay_whole() -> None:
    setup, _ = scene("causal-lm", EPOCHS)
    runner = BatchedRunner(setup, 2)
    stacks = list(runner.stacks(runner.order(COHORT)))
    assert stacks == [["c", "a"], ["e", "b"], ["d"]]
    for done, left in {
        "": ["c", "a", "e", "b", "d"],
        "c": ["c", "a", "e", "b", "d"],
        "ca": ["e", "b", "d"],
        "eb": ["c", "a", "d"],
        "ad": ["c", "a", "e", "b"],
        "dacbe": [],
    }.items():
        assert runner.order(COHORT, set(done)) == left
        whole = [stack for stack in stacks if not set(stack) <= set(done)]
        assert list(runner.stacks(left)) == whole
    assert SerialRunner(setup).order(COHORT, {"b", "a"}) == ["c", "d", "e"]


def test_work_is_made_stack_by_stack() -> None:
    setup, works = scene("causal-lm", ADAMW, many(6))
    made: list[str] = []

    def making() -> Iterator[ClientWork]:
        for work in works:
            made.append(work.client_id)
            yield work

    results = BatchedRunner(setup, 2).run_cohort(making())
    assert made == []
    assert next(results).client_id == "a"
    assert made == ["a", "b"]
    rest = list(results)
    assert [result.client_id for result in rest] == list("bcdef")


# deterministic counters


def test_a_stack_of_like_clients_takes_the_passes_of_one() -> None:
    for task in TASKS:
        setup, works = scene(task, replace(ADAMW, accumulation=2), ALIKE)
        passes = count_passes(setup.resident)
        stacked(setup, works[:1])
        alone = len(passes)
        passes.clear()
        stacked(setup, works)
        assert alone == 4 * 2
        assert len(passes) == alone
        assert {shape[0] for shape in passes} == {4}


def test_tokens_and_padding_count_what_is_computed() -> None:
    setup, works = scene("causal-lm", replace(EPOCHS, accumulation=2))
    computed = 0

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal computed
        computed += inputs[0].shape[0] * inputs[0].shape[1]

    setup.resident.model.get_submodule(setup.resident.layout.targets[0].path).register_forward_pre_hook(note)
    outcomes = stacked(setup, works)
    lengths = setup.data.lengths
    real = {work.client_id: int(lengths[list(work.indices)].sum()) for work in works}
    assert {outcome.client_id: outcome.metrics.tokens for outcome in outcomes} == {
        client: 2 * tokens for client, tokens in real.items()
    }
    assert sum(outcome.metrics.tokens + outcome.metrics.padded_tokens for outcome in outcomes) == computed


def test_changing_the_clients_copies_each_adapter_once_in_and_once_out() -> None:
    for task in TASKS:
        setup, works = scene(task, ADAMW, ALIKE)
        model, sizes = setup.resident, [work.size for work in works]
        model.resize(4, num_clients=4)
        adapter_bytes = sum(tensor.numel() * 4 for tensor in works[0].start.values())
        with CountOperators() as served:
            model.serve_stack([work.start for work in works], sizes=sizes, base_deltas={})
        assert served.copied_bytes == 4 * adapter_bytes
        assert "zero_" not in served.counts
        with CountOperators() as taken:
            for slot in range(4):
                model.read(ALL, slot)
        assert taken.copied_bytes == 4 * adapter_bytes


def operators_of_a_step(task: Task, num_kinds: int, num_clients: int) -> dict[str, int]:
    """Operators of one optimizer step: what a round of two steps has more than a round of one."""
    base = tiny_llama() if task == "causal-lm" else tiny_bert_classifier()
    targets = (CAUSAL_TARGETS if task == "causal-lm" else CLASSIFIER_TARGETS)[:num_kinds]
    heads = () if task == "causal-lm" else ("classifier",)
    model = adapt(base, target_modules=targets, rank=4, head_modules=heads)
    clients = many(num_clients)
    works = work_for(model, clients)
    model.resize(4, num_clients=num_clients)
    counts = []
    for local_steps in (1, 2):
        setup = setup_of(model, clients, replace(TRAINING, local_steps=local_steps), task)
        with CountOperators() as counting:
            stacked(setup, works)
        counts.append(counting.counts)
    return {name: counts[1][name] - counts[0].get(name, 0) for name in counts[1]}


@every_task
def test_operators_per_layer_do_not_grow_with_the_number_of_clients(task: Task) -> None:
    per_step = {(kinds, number): operators_of_a_step(task, kinds, number) for kinds in (1, 2) for number in (2, 16)}
    added = {
        number: {name: count - per_step[1, number].get(name, 0) for name, count in per_step[2, number].items()}
        for number in (2, 16)
    }
    assert added[2] == added[16]
    assert added[2]["bmm"] > 0
    # Each client's head is a linear layer of its own: forward, and the gradients of weight and input.
    products = [sum(per_step[1, number].get(name, 0) for name in ("mm", "addmm", "bmm")) for number in (2, 16)]
    assert products[1] - products[0] == (0 if task == "causal-lm" else 14 * 3)
