"""The summed cross-entropy of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sfedlora.data.encoded import EncodedData, collate
from sfedlora.federation.objective import batch_loss
from support.tiny_federation import PAD, random_classes, random_text
from support.tiny_models import VOCAB_SIZE, tiny_bert_classifier, tiny_llama

CPU = torch.device("cpu")


def test_the_causal_loss_is_that_of_the_model_itself_times_its_tokens() -> None:
    model, batch = tiny_llama(), collate(random_text(9), range(9), pad_token_id=PAD)
    ours = batch_loss(model, batch, "causal-lm", CPU)
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert ours.count == int((batch.labels != -100).sum()) == batch.num_labels
    assert float(ours.total.detach()) == pytest.approx(float(theirs.loss) * ours.count, rel=1e-6)
    assert ours.predictions is None


def test_the_causal_loss_of_each_example_is_that_of_the_example_alone() -> None:
    model, data = tiny_llama(), random_text(9)
    ours = batch_loss(model, collate(data, range(9), pad_token_id=PAD), "causal-lm", CPU)
    assert ours.per_example.shape == (9,)
    assert ours.total.equal(ours.per_example.sum())
    for index, found in enumerate(ours.per_example.tolist()):
        alone = collate(data, [index], pad_token_id=PAD)
        with torch.no_grad():
            logits = model(input_ids=alone.input_ids).logits
        expected = cross_entropy(logits[0, :-1], alone.labels[0, 1:], reduction="sum")
        assert found == pytest.approx(float(expected), rel=1e-6)


def test_the_causal_loss_by_hand() -> None:
    # Uniform logits cost log(vocabulary) at every labelled token, and only there.
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    one = EncodedData(np.arange(3, 9, dtype=np.int32), np.array([0, 6]), np.array([4], dtype=np.int32))
    loss = batch_loss(model, collate(one, [0], pad_token_id=PAD), "causal-lm", CPU)
    assert loss.count == 2
    assert float(loss.total.detach()) == pytest.approx(2 * math.log(VOCAB_SIZE), rel=1e-6)


def test_padding_and_neighbours_do_not_matter() -> None:
    model, data = tiny_llama(), random_text(9)
    together = batch_loss(model, collate(data, range(9), pad_token_id=PAD), "causal-lm", CPU)
    apart = [batch_loss(model, collate(data, [index], pad_token_id=PAD), "causal-lm", CPU) for index in range(9)]
    assert together.count == sum(item.count for item in apart)
    assert float(together.total.detach()) == pytest.approx(sum(float(item.total.detach()) for item in apart), rel=1e-6)


def test_classification_sums_over_examples_and_predicts_the_largest_logit() -> None:
    model, batch = tiny_bert_classifier(), collate(random_classes(9), range(9), pad_token_id=PAD)
    loss = batch_loss(model, batch, "sequence-classification", CPU)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert loss.count == 9
    assert float(loss.total.detach()) == pytest.approx(float(cross_entropy(logits, batch.labels)) * 9, rel=1e-6)
    assert torch.allclose(loss.per_example, cross_entropy(logits, batch.labels, reduction="none"), rtol=1e-6)
    assert loss.total.equal(loss.per_example.sum())
    assert loss.predictions is not None
    assert loss.predictions.tolist() == logits.numpy().argmax(1).tolist()


def test_the_sum_is_taken_in_float32_under_a_bfloat16_base() -> None:
    model, batch = tiny_llama().to(torch.bfloat16), collate(random_text(9), range(9), pad_token_id=PAD)
    assert batch_loss(model, batch, "causal-lm", CPU).total.dtype == torch.float32
