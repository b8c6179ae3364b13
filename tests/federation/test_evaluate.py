"""Loss, perplexity, accuracy and macro-F1 against independent computations; means over clients by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from federation.peft_oracle import Example, batch_nll
from sfedlora.data.encoded import EncodedData
from sfedlora.federation.evaluate import EvalBatching, EvalResult, evaluate_examples, evaluate_stack, mean_results
from sfedlora.federation.objective import Task
from sfedlora.types import LoraSize, Part
from support.tiny_federation import PAD, adapted, random_classes, random_text
from support.tiny_models import tiny_bert_classifier, tiny_llama

CHOSEN = [3, 17, 4, 9, 11, 2, 30, 5]


def evaluate(task: Task, data: EncodedData, indices: list[int], batching: EvalBatching) -> EvalResult:
    [result] = evaluate_examples(adapted(task), data, [indices], task=task, batching=batching, pad_token_id=PAD)
    return result


@pytest.mark.parametrize("batching", [EvalBatching(1, 64), EvalBatching(3, 64), EvalBatching(99, 9999)], ids=str)
def test_causal_loss_is_the_mean_over_labelled_tokens_whatever_the_batches(batching: EvalBatching) -> None:
    data = random_text(40)
    assert data.label_starts is not None
    result = evaluate("causal-lm", data, CHOSEN, batching)
    plain = [Example(data.example_tokens(i).tolist(), int(data.label_starts[i])) for i in CHOSEN]
    with torch.no_grad():
        total, count = batch_nll(tiny_llama(), plain, classify=False, pad=PAD)
    assert result.num_examples == len(CHOSEN)
    assert result.loss == pytest.approx(float(total) / count, rel=1e-5)
    assert result.metrics() == {"eval_loss": result.loss, "perplexity": pytest.approx(math.exp(result.loss))}


@pytest.mark.parametrize("batching", [EvalBatching(1, 64), EvalBatching(3, 64), EvalBatching(99, 9999)], ids=str)
@pytest.mark.parametrize("num_labels", [2, 3])
def test_classification_metrics_are_those_of_scikit_learn(batching: EvalBatching, num_labels: int) -> None:
    data = random_classes(60, num_labels=num_labels)
    assert data.labels is not None
    chosen = list(range(5, 55))
    result = evaluate("sequence-classification", data, chosen, batching)
    model = tiny_bert_classifier()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([data.example_tokens(i).tolist()])).logits[0] for i in chosen]
    predicted = [int(row.argmax()) for row in logits]
    labels = data.labels[chosen].tolist()
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    losses = [-float(row.log_softmax(-1)[label]) for row, label in zip(logits, labels, strict=True)]
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.accuracy == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert result.macro_f1 == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    assert len(set(predicted)) > 1  # else macro-F1 says little
    assert set(result.metrics()) == {"eval_loss", "accuracy", "macro_f1"}


def test_macro_f1_counts_the_classes_that_occur() -> None:
    # Only one example of class 0: predicted right, macro-F1 is 1 over that one class; predicted wrong, 0 over two.
    data = random_classes(60)
    assert data.labels is not None
    model = tiny_bert_classifier()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([data.example_tokens(i).tolist()])).logits[0] for i in range(60)]
    predicted = [int(row.argmax()) for row in rows]
    right = next(i for i in range(60) if predicted[i] == data.labels[i])
    wrong = next(i for i in range(60) if predicted[i] != data.labels[i])
    batching = EvalBatching(4, 64)
    assert evaluate("sequence-classification", data, [right], batching).macro_f1 == 1.0
    assert evaluate("sequence-classification", data, [wrong], batching).macro_f1 == 0.0


def test_means_over_clients_by_hand() -> None:
    results = {"a": EvalResult(1, 1.0, 0.0, 0.2), "b": EvalResult(3, 2.0, 1.0, 0.6)}
    assert mean_results(results, weighted=True) == pytest.approx({"eval_loss": 1.75, "accuracy": 0.75, "macro_f1": 0.5})
    assert mean_results(results, weighted=False) == pytest.approx({"eval_loss": 1.5, "accuracy": 0.5, "macro_f1": 0.4})


def test_mean_perplexity_is_that_of_the_mean_loss() -> None:
    results = {"a": EvalResult(1, 1.0), "b": EvalResult(3, 2.0)}
    assert mean_results(results, weighted=True)["perplexity"] == pytest.approx(math.exp(1.75))
    assert mean_results(results, weighted=False)["perplexity"] == pytest.approx(math.exp(1.5))


def test_perplexity_that_overflows_is_infinite() -> None:
    assert EvalResult(1, 1e4).metrics()["perplexity"] == math.inf


def test_evaluation_leaves_the_model_and_its_gradients_alone() -> None:
    resident = adapted()
    before = {name: tensor.clone() for name, tensor in resident.read().items()}
    evaluate_examples(
        resident, random_text(9), [[0, 1]], task="causal-lm", batching=EvalBatching(4, 64), pad_token_id=PAD
    )
    assert all(resident.read()[name].equal(before[name]) for name in before)
    assert resident.dropout.seeds is None
    assert not any(bool(resident.flat_grad(part).any()) for part in (Part.A, Part.B))


GROUPS = [[3, 17, 4], [9], [11, 2, 30, 5, 8, 1, 33], [12, 13]]
TASKS: list[Task] = ["causal-lm", "sequence-classification"]


def data_of(task: Task) -> EncodedData:
    return random_text(40) if task == "causal-lm" else random_classes(40)


@pytest.mark.parametrize("task", TASKS)
def test_clients_of_one_model_get_their_own_metrics_out_of_common_batches(task: Task) -> None:
    data, resident, batching = data_of(task), adapted(task), EvalBatching(4, 40)
    together = evaluate_examples(resident, data, GROUPS, task=task, batching=batching, pad_token_id=PAD)
    for group, result in zip(GROUPS, together, strict=True):
        alone = evaluate(task, data, group, batching)
        assert result.num_examples == len(group)
        assert result.metrics() == pytest.approx(alone.metrics(), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_a_stack_gets_the_metrics_of_each_adapter_alone(task: Task) -> None:
    data, resident, batching = data_of(task), adapted(task), EvalBatching(8, 60)
    names = resident.read()
    generator = torch.Generator().manual_seed(0)
    sizes = [LoraSize(rank, 2.0 / rank) for rank in (4, 2, 4, 1)]
    shapes = [resident.layout.shapes(size.rank) for size in sizes]
    adapters = [{name: torch.randn(own[name], generator=generator) * 0.3 for name in names} for own in shapes]
    resident.serve_stack(adapters, sizes=sizes, base_deltas={})
    stacked = evaluate_stack(resident, data, GROUPS, task=task, batching=batching, pad_token_id=PAD)
    losses = set()
    for group, adapter, size, result in zip(GROUPS, adapters, sizes, stacked, strict=True):
        resident.serve(adapter, size=size, base_deltas={})
        [alone] = evaluate_examples(resident, data, [group], task=task, batching=batching, pad_token_id=PAD)
        assert result.num_examples == len(group)
        assert result.metrics() == pytest.approx(alone.metrics(), rel=1e-5)
        losses.add(round(alone.loss, 4))
    assert len(losses) == len(GROUPS)  # the adapters matter
