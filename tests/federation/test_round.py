"""The round loop on real tiny models: order, personal B, failures, and every number of a metrics line by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.capturing import Capturing
from federation.peft_oracle import Example, PlainLoop, batch_nll, wrap
from sfedlora.data.batches import plan_local_batches
from sfedlora.errors import ClientError, RunError
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainingSetup, train_client
from sfedlora.federation.round import (
    ClientTrained,
    RoundFinished,
    RoundStarted,
    evaluate_clients,
    evaluate_external,
    run_rounds,
)
from sfedlora.federation.runners import Runner
from sfedlora.federation.runners.serial import SerialRunner
from sfedlora.federation.sampling import sample_cohort, sample_evaluated
from sfedlora.federation.state import POOLED_ID, Federation, FederationState, initial_state, serving_adapter
from sfedlora.seeds import derive_seed
from sfedlora.types import Part, Tensors, part_of, select_parts
from support.tiny_federation import (
    CAUSAL_TARGETS,
    PAD,
    ROUNDS,
    TRAINING,
    random_text,
    run_all,
    tiny_federation,
)
from support.tiny_models import tiny_llama

CLIENTS = ("a", "b", "c", "d")
EXAMPLES = {"a": 9, "b": 14, "c": 6, "d": 11}
SECONDS = {"train_seconds", "aggregate_seconds", "eval_seconds"}
BYTES_A = 4 * 4 * (24 + 24 + 40) * 2  # 4 bytes, rank 4, in_features of q, v, down, 2 layers
BYTES_B = 4 * 4 * (24 + 12 + 24) * 2  # out_features; v has 2 key-value heads of 6


@dataclass(frozen=True)
class ShuffledRunner:
    """Executes a cohort in one order and hands over the outcomes in another."""

    inner: Runner
    seed: int

    @property
    def clients_per_batch(self) -> int:
        return self.inner.clients_per_batch

    def stack_at_most(self, clients_per_batch: int) -> None:
        self.inner.stack_at_most(clients_per_batch)

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        return self.inner.order(cohort, done)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        generator = random.Random(self.seed)  # noqa: S311 - an order, not a secret
        work = list(cohort)
        generator.shuffle(work)
        outcomes = list(self.inner.run_cohort(work))
        generator.shuffle(outcomes)
        yield from outcomes


@dataclass(frozen=True)
class FailingRunner:
    """Fails for some clients in some rounds, and spoils the factors that others send."""

    inner: Runner
    fails: frozenset[tuple[str, int]] = frozenset()
    spoils: frozenset[tuple[str, int]] = frozenset()

    @property
    def clients_per_batch(self) -> int:
        return self.inner.clients_per_batch

    def stack_at_most(self, clients_per_batch: int) -> None:
        self.inner.stack_at_most(clients_per_batch)

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        return self.inner.order(cohort, done)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome | ClientError]:
        for work in cohort:
            key = (work.client_id, work.round_num)
            if key in self.fails:
                yield ClientError("out of memory", client_id=key[0], round_num=key[1], stage="training")
                continue
            for outcome in self.inner.run_cohort([work]):
                if isinstance(outcome, ClientOutcome) and key in self.spoils:
                    yield replace(outcome, tensors={n: t * float("nan") for n, t in outcome.tensors.items()})
                else:
                    yield outcome


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def same_state(left: FederationState, right: FederationState) -> bool:
    return (
        left.server.round_num == right.server.round_num
        and equal(left.server.shared, right.server.shared)
        and equal(left.server.extra, right.server.extra)
        and left.personal.keys() == right.personal.keys()
        and all(equal(left.personal[key], right.personal[key]) for key in left.personal)
        and left.optimizer.keys() == right.optimizer.keys()
        and all(equal(left.optimizer[key], right.optimizer[key]) for key in left.optimizer)
    )


def timeless(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in SECONDS} for record in records]


# Order


@pytest.mark.parametrize("method", ["fedsa", "fedit", "ffa", "local"])
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_the_order_of_clients_and_of_their_updates_changes_no_bit(method: str, task: Any) -> None:
    training = replace(TRAINING, optimizer="adamw", keep_optimizer_state=True, max_grad_norm=0.5)
    rounds = replace(ROUNDS, learning_rate=0.01, num_rounds=3, cohort_size=3)
    plain = tiny_federation(method=method, task=task, training=training, rounds=rounds, dropout=0.2)
    expected = run_all(plain)
    for seed in range(3):
        other = tiny_federation(method=method, task=task, training=training, rounds=rounds, dropout=0.2)
        ran = run_all(replace(other, runner=ShuffledRunner(other.runner, seed)))
        assert all(same_state(one, two) for one, two in zip(ran.states, expected.states, strict=True))
        assert timeless(ran.records) == timeless(expected.records)


def test_the_text_of_a_line_does_not_depend_on_who_failed_first() -> None:
    lines = set()
    for seed in range(6):
        federation = tiny_federation(rounds=replace(ROUNDS, num_rounds=1))
        failing = FailingRunner(federation.runner, fails=frozenset({("a", 1), ("c", 1), ("d", 1)}))
        ran = run_all(replace(federation, runner=ShuffledRunner(failing, seed)))
        lines.add(json.dumps(timeless(ran.records)))
    assert len(lines) == 1


def test_a_run_repeats_itself_on_a_used_model() -> None:
    federation = tiny_federation()
    assert same_state(run_all(federation).states[-1], run_all(federation).states[-1])


@pytest.mark.parametrize("stop", [1, 2])
def test_going_on_from_a_state_gives_the_bits_of_an_uninterrupted_run(stop: int) -> None:
    training = replace(TRAINING, optimizer="adamw", keep_optimizer_state=True)
    rounds = replace(ROUNDS, num_rounds=3, cohort_size=3)
    whole = run_all(tiny_federation(training=training, rounds=rounds))
    federation = tiny_federation(training=training, rounds=rounds)
    later = [event for event in run_rounds(federation, whole.states[stop]) if isinstance(event, RoundFinished)]
    assert [event.record["round_num"] for event in later] == list(range(stop + 1, 4))
    assert same_state(later[-1].state, whole.states[-1])
    assert timeless(event.record for event in later) == timeless(whole.records[stop:])


def test_clients_that_had_finished_are_not_trained_again() -> None:
    federation = tiny_federation()
    capturing = Capturing(federation.runner)
    whole = run_all(replace(federation, runner=capturing))
    finished = {outcome.client_id: outcome for outcome in capturing.outcomes[:2]}
    assert set(finished) == {"a", "b"}
    capturing.work.clear()
    events = list(run_rounds(replace(federation, runner=capturing), whole.states[0], finished))
    assert [work.client_id for work in capturing.work] == ["c", "d", *CLIENTS]
    assert [event.client_id for event in events if isinstance(event, ClientTrained)][:4] == list(CLIENTS)
    last = events[-1]
    assert isinstance(last, RoundFinished)
    assert same_state(last.state, whole.states[-1])


# Personal B


def examples_of(federation: Federation, client_id: str, round_num: int) -> list[list[list[Example]]]:
    data = federation.data
    assert data.label_starts is not None
    steps = plan_local_batches(
        data.lengths,
        federation.participants[client_id],
        batch_size=TRAINING.batch_size,
        local_steps=TRAINING.local_steps,
        local_epochs=None,
        accumulation=1,
        seed=derive_seed(federation.seed, "batches", client_id, round_num),
        order_seed=derive_seed(federation.seed, "order of batches", round_num),
    )
    plain = [Example(data.example_tokens(i).tolist(), int(start)) for i, start in enumerate(data.label_starts)]
    return [[[plain[index] for index in batch] for batch in step] for step in steps]


@pytest.mark.parametrize("cohort_size", [None, 2])
def test_b_of_a_client_is_what_it_gets_alone_against_the_recorded_broadcasts(cohort_size: int | None) -> None:
    rounds = replace(ROUNDS, num_rounds=4, cohort_size=cohort_size)
    ran = run_all(tiny_federation(rounds=rounds))
    for client_id in CLIENTS:
        alone = tiny_federation(rounds=rounds)
        own = select_parts(alone.initial, [Part.B])
        for before, record in zip(ran.states, ran.records, strict=False):
            if client_id not in record["cohort"]:
                continue
            work = ClientWork(
                client_id=client_id,
                round_num=record["round_num"],
                start={**before.server.shared, **own},
                trained=frozenset(Part),
                size=alone.sizes.server,
                learning_rate=0.05,
                indices=alone.splits[client_id].train,
                optimizer_state={},
            )
            setup = TrainingSetup(alone.resident, alone.data, TRAINING, "causal-lm", PAD, alone.seed)
            outcome = train_client(setup, work)
            own = select_parts(outcome.tensors, [Part.B])
        took_part = any(client_id in record["cohort"] for record in ran.records)
        assert took_part == (client_id in ran.states[-1].personal)
        if took_part:
            assert equal(own, ran.states[-1].personal[client_id])
    personal = list(ran.states[-1].personal.values())
    for one, two in ((personal[i], personal[j]) for i in range(len(personal)) for j in range(i)):
        assert max(float((one[name] - two[name]).abs().max()) for name in one) > 1e-4


def test_b_equals_a_plain_peft_loop_against_the_recorded_broadcasts() -> None:
    federation = tiny_federation(rounds=replace(ROUNDS, num_rounds=3))
    ran = run_all(federation)
    for client_id in ("a", "c"):
        own: dict[str, Tensor] = dict(select_parts(federation.initial, [Part.B]))
        for before, round_num in zip(ran.states, (1, 2, 3), strict=False):
            start = {**before.server.shared, **own}
            model = wrap(tiny_llama(), CAUSAL_TARGETS, rank=4, scaling=federation.sizes.server.scaling, start=start)
            loop = PlainLoop(model, "sgd", learning_rate=0.05)
            own = {
                f"b:{path}": tensor
                for path, tensor in loop.run(examples_of(federation, client_id, round_num)).b.items()
            }
        kept = ran.states[-1].personal[client_id]
        largest = max(float(tensor.abs().max()) for tensor in own.values())
        assert max(float((kept[name] - own[name]).abs().max()) for name in own) < 1e-5 * largest
        assert largest > 1e-3


def test_a_is_the_weighted_mean_of_what_the_cohort_trained() -> None:
    federation = tiny_federation()
    capturing = Capturing(federation.runner)
    ran = run_all(replace(federation, runner=capturing))
    sent = capturing.outcomes[4:]
    for name, tensor in ran.states[2].server.shared.items():
        by_hand = sum(EXAMPLES[o.client_id] / 40 * o.tensors[name].double().numpy() for o in sent)
        np.testing.assert_allclose(tensor.double().numpy(), by_hand, atol=1e-7)
    for work in capturing.work[4:]:
        assert equal(select_parts(work.start, [Part.A]), ran.states[1].server.shared)
        assert equal(select_parts(work.start, [Part.B]), ran.states[1].personal[work.client_id])


# Initialisation and what is served


@pytest.mark.parametrize("init", ["independent", "local"])
def test_with_init_local_round_1_alone_starts_from_own_draws(init: Any) -> None:
    federation = tiny_federation(init=init, rounds=replace(ROUNDS, cohort_size=3, num_rounds=3))
    capturing = Capturing(federation.runner)
    run_all(replace(federation, runner=capturing))
    starts = {(work.round_num, work.client_id): select_parts(work.start, [Part.A]) for work in capturing.work}
    for round_num in (1, 2, 3):
        of_round = [start for (number, _), start in starts.items() if number == round_num]
        assert len(of_round) == 3
        own_draws = init == "local" and round_num == 1
        assert equal(of_round[0], of_round[1]) != own_draws
    serving = serving_adapter(federation, initial_state(federation), "a")
    assert equal(select_parts(serving, [Part.A]), select_parts(federation.initial, [Part.A]))


def test_clients_of_method_local_have_their_own_a_from_the_start() -> None:
    apart = tiny_federation(method="local", init="independent")
    same = tiny_federation(method="local", init="shared")
    a_of = {
        client: select_parts(serving_adapter(apart, initial_state(apart), client), [Part.A]) for client in ("a", "b")
    }
    assert not equal(a_of["a"], a_of["b"])
    assert equal(serving_adapter(same, initial_state(same), "a"), serving_adapter(same, initial_state(same), "b"))
    trained = run_all(apart).states[-1]
    assert equal(serving_adapter(apart, trained, "a"), {**trained.personal["a"]})


def test_under_ffa_a_stays_the_initial_one() -> None:
    federation = tiny_federation(method="ffa")
    last = run_all(federation).states[-1]
    assert equal(select_parts(last.server.shared, [Part.A]), select_parts(federation.initial, [Part.A]))
    assert last.personal.keys() == set(CLIENTS)
    assert all(not tensors for tensors in last.personal.values())


def test_centralized_trains_one_participant_and_serves_it_to_everybody() -> None:
    federation = tiny_federation(method="centralized", init="shared")
    pooled = sorted(index for split in federation.splits.values() for index in split.train)
    federation = replace(federation, participants={POOLED_ID: pooled})
    ran = run_all(federation)
    assert ran.records[0]["cohort"] == (POOLED_ID,) or ran.records[0]["cohort"] == [POOLED_ID]
    served = [serving_adapter(federation, ran.states[-1], client) for client in CLIENTS]
    assert all(equal(served[0], other) for other in served[1:])
    assert set(ran.records[0]["clients"]) == {POOLED_ID, *CLIENTS}


# Failures


def test_a_failed_client_is_recorded_and_the_others_go_on() -> None:
    federation = tiny_federation()
    spoilt = replace(federation, runner=FailingRunner(federation.runner, fails=frozenset({("b", 1), ("d", 2)})))
    ran = run_all(spoilt)
    assert ran.records[0]["excluded"] == {"b": "out of memory"}
    assert ran.records[1]["excluded"] == {"d": "out of memory"}
    assert set(ran.states[1].personal) == {"a", "c", "d"}
    assert equal(ran.states[2].personal["d"], ran.states[1].personal["d"])
    assert list(ran.records[0]["cohort"]) == list(CLIENTS)
    assert ran.records[0]["bytes_up"] == 3 * BYTES_A
    assert ran.records[0]["bytes_down"] == 4 * BYTES_A
    assert ran.records[0]["effective_cohort_size"] == pytest.approx(26**2 / (9**2 + 6**2 + 11**2))
    without = tiny_federation(sizes=EXAMPLES)
    without = replace(without, participants={c: without.participants[c] for c in ("a", "c", "d")})
    one_round = replace(without, rounds=replace(ROUNDS, num_rounds=1), initial=federation.initial)
    assert equal(run_all(one_round).states[1].server.shared, ran.states[1].server.shared)


def test_a_refused_update_is_recorded_and_changes_nothing_at_its_client() -> None:
    federation = tiny_federation()
    spoilt = replace(federation, runner=FailingRunner(federation.runner, spoils=frozenset({("c", 2)})))
    ran = run_all(spoilt)
    assert ran.records[0]["excluded"] == {}
    assert ran.records[1]["excluded"] == {"c": "holds NaN or infinite values"}
    assert equal(ran.states[2].personal["c"], ran.states[1].personal["c"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in ran.states[2].server.shared.values())
    assert "train_loss" not in ran.records[1]["clients"]["c"]


def test_a_client_whose_training_diverges_is_excluded_with_the_reason() -> None:
    federation = tiny_federation()
    start = initial_state(federation)
    broken = {name: tensor + float("nan") for name, tensor in select_parts(federation.initial, [Part.B]).items()}
    only_cohort = replace(federation, rounds=replace(ROUNDS, num_rounds=1, evaluated=1))
    events = list(run_rounds(only_cohort, replace(start, personal={"b": broken})))
    [failed] = [event for event in events if isinstance(event, ClientTrained) and event.error is not None]
    last = events[-1]
    assert isinstance(last, RoundFinished)
    assert (failed.client_id, failed.outcome) == ("b", None)
    assert list(last.record["excluded"]) == ["b"]
    assert "the training loss became NaN or infinite at local step 1" in last.record["excluded"]["b"]
    assert np.isfinite(last.record["train_loss"])


def test_a_client_with_moments_of_another_rank_is_excluded() -> None:
    adamw = replace(TRAINING, optimizer="adamw", keep_optimizer_state=True)
    federation = tiny_federation(training=adamw, rounds=replace(ROUNDS, num_rounds=1))
    moments = {"b/step": torch.tensor(1.0), "b/exp_avg": torch.ones(3), "b/exp_avg_sq": torch.ones(3)}
    *_, last = run_rounds(federation, replace(initial_state(federation), optimizer={"b": moments}))
    assert isinstance(last, RoundFinished)
    assert list(last.record["excluded"]) == ["b"]
    assert "kept b/exp_avg has shape (3,), expected" in last.record["excluded"]["b"]


def test_a_client_that_torch_refuses_is_excluded_with_the_first_line() -> None:
    """Its training examples have more tokens than the encoder has positions."""
    federation = tiny_federation(task="sequence-classification", rounds=replace(ROUNDS, num_rounds=1))
    data, long = federation.data, federation.splits["b"].train
    lengths = [1000 if index in long else int(length) for index, length in enumerate(data.lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    longer = replace(data, tokens=np.full(offsets[-1], 5, dtype=np.int32), offsets=offsets)
    assert isinstance(federation.runner, SerialRunner)
    changed = replace(federation, data=longer, runner=SerialRunner(replace(federation.runner.setup, data=longer)))
    *_, last = run_rounds(changed, initial_state(changed))
    assert isinstance(last, RoundFinished)
    assert list(last.record["excluded"]) == ["b"]
    assert last.record["excluded"]["b"].startswith("RuntimeError: The expanded size")
    assert "\n" not in last.record["excluded"]["b"]
    assert set(last.state.personal) == {"a", "c", "d"}


def test_a_cohort_that_fails_altogether_stops_the_run_and_names_everybody() -> None:
    federation = tiny_federation(
        training=replace(TRAINING, weight_decay=1e3), rounds=replace(ROUNDS, learning_rate=3e38)
    )
    with pytest.raises(RunError, match="round 1: every client of the cohort failed") as caught:
        run_all(federation)
    assert not isinstance(caught.value, ClientError)
    assert all(f"{client}: " in str(caught.value) for client in CLIENTS)


# The metrics line


@pytest.mark.parametrize(
    ("method", "up"), [("fedsa", BYTES_A), ("fedit", BYTES_A + BYTES_B), ("ffa", BYTES_B), ("local", 0)]
)
def test_bytes_by_hand(method: str, up: int) -> None:
    ran = run_all(tiny_federation(method=method, rounds=replace(ROUNDS, cohort_size=3)))
    for record in ran.records:
        assert record["bytes_up"] == 3 * up
        assert record["bytes_down"] == 3 * up


def test_a_shared_head_travels_and_a_personal_one_does_not() -> None:
    head = 4 * (3 * 24 + 3)
    bytes_a = 4 * 4 * 24 * 4
    sizes = {}
    for placement in ("personal", "shared"):
        federation = tiny_federation(task="sequence-classification", head=placement)
        sizes[placement] = run_all(federation).records[0]["bytes_up"]
    assert sizes == {"personal": 4 * bytes_a, "shared": 4 * (bytes_a + head)}


def test_the_numbers_of_a_line_by_hand() -> None:
    federation = tiny_federation(rounds=replace(ROUNDS, cohort_size=3, num_rounds=3))
    capturing = Capturing(federation.runner)
    ran = run_all(replace(federation, runner=capturing))
    for number, record in enumerate(ran.records, start=1):
        cohort = sample_cohort(CLIENTS, 3, seed=0, round_num=number)
        outcomes = [outcome for outcome in capturing.outcomes if outcome.round_num == number]
        starts = [work.start for work in capturing.work if work.round_num == number]
        counts = [EXAMPLES[client] for client in cohort]
        assert (record["round_num"], tuple(record["cohort"])) == (number, cohort)
        assert [outcome.client_id for outcome in outcomes] == list(cohort)
        losses = [outcome.metrics.train_loss for outcome in outcomes]
        assert record["train_loss"] == pytest.approx(np.average(losses, weights=counts))
        assert record["grad_norm_a"] == pytest.approx(fmean(o.metrics.grad_norm_a or 0.0 for o in outcomes))
        assert record["grad_norm_b"] == pytest.approx(fmean(o.metrics.grad_norm_b or 0.0 for o in outcomes))
        assert record["tokens"] == sum(o.metrics.tokens for o in outcomes)
        assert record["padded_tokens"] == sum(o.metrics.padded_tokens for o in outcomes)
        assert record["scaling"] == pytest.approx(8 * np.sqrt(record["effective_clients"] / 4))
        assert record["effective_clients"] == pytest.approx(40**2 / (9**2 + 14**2 + 6**2 + 11**2))
        assert record["effective_cohort_size"] == pytest.approx(sum(counts) ** 2 / sum(n * n for n in counts))
        squares = [
            float(tensor.double().square().sum()) / tensor.shape[1]
            for start in starts
            for name, tensor in start.items()
            if part_of(name) is Part.A
        ]
        assert record["gain"] == pytest.approx(record["scaling"] ** 2 * np.mean(squares), rel=1e-5)
    assert [bool(record["grad_norm_a"]) for record in ran.records] == [False, True, True]  # B is 0 in round 1


def test_evaluation_uses_what_a_client_serves_after_aggregation() -> None:
    federation = tiny_federation()
    ran = run_all(federation)
    losses, counts = {}, {}
    for client, (client_id, _, result) in zip(
        CLIENTS, evaluate_clients(federation, ran.states[-1], "validation", ()), strict=True
    ):
        assert client == client_id
        losses[client], counts[client] = result.loss, result.num_examples
        assert ran.records[-1]["clients"][client]["eval_loss"] == result.loss
        assert ran.records[-1]["clients"][client]["num_evaluated"] == 3
    assert ran.records[-1]["eval_loss_unweighted"] == pytest.approx(fmean(losses.values()))
    assert ran.records[-1]["eval_loss"] == pytest.approx(
        sum(losses[c] * counts[c] for c in CLIENTS) / sum(counts.values())
    )
    assert ran.records[-1]["perplexity"] == pytest.approx(np.exp(ran.records[-1]["eval_loss"]))


@pytest.mark.parametrize("method", ["fedsa", "local"])
def test_each_client_is_evaluated_with_its_own_factors_by_stock_peft(method: str) -> None:
    federation = tiny_federation(method=method)
    ran = run_all(federation)
    for client in CLIENTS:
        start = {**ran.states[-1].server.shared, **ran.states[-1].personal[client]}
        model = wrap(tiny_llama(), CAUSAL_TARGETS, rank=4, scaling=federation.sizes.server.scaling, start=start)
        data = federation.data
        assert data.label_starts is not None
        chosen = [
            Example(data.example_tokens(i).tolist(), int(data.label_starts[i]))
            for i in federation.splits[client].validation
        ]
        with torch.no_grad():
            total, count = batch_nll(model, chosen, classify=False, pad=PAD)
        assert ran.records[-1]["clients"][client]["eval_loss"] == pytest.approx(float(total) / count, rel=1e-5)


@pytest.mark.parametrize("evaluated", ["all", "cohort", 2])
def test_who_is_evaluated(evaluated: Any) -> None:
    federation = tiny_federation(rounds=replace(ROUNDS, cohort_size=3, num_rounds=4, evaluated=evaluated))
    for number, record in enumerate(run_all(federation).records, start=1):
        cohort = sample_cohort(CLIENTS, 3, seed=0, round_num=number)
        expected = {"all": CLIENTS, "cohort": cohort, 2: sample_evaluated(CLIENTS, 2, seed=0)}[evaluated]
        assert {c for c, entry in record["clients"].items() if "eval_loss" in entry} == set(expected)
        assert {c for c, entry in record["clients"].items() if "train_loss" in entry} == set(cohort)


def test_evaluation_every_other_round_and_always_the_last() -> None:
    ran = run_all(tiny_federation(rounds=replace(ROUNDS, num_rounds=5, evaluate_every=2)))
    assert [record["eval_loss"] is not None for record in ran.records] == [False, True, False, True, True]


def test_the_extra_file_is_evaluated_with_every_client_and_averaged() -> None:
    federation = replace(tiny_federation(), external={"validation": random_text(7, seed=5)})
    state = run_all(federation).states[-1]
    both = evaluate_external(federation, state, ["a", "b"], "validation")["external_validation"]["eval_loss"]
    each = [
        evaluate_external(federation, state, [client], "validation")["external_validation"]["eval_loss"]
        for client in ("a", "b")
    ]
    assert each[0] != each[1]
    assert both == pytest.approx(fmean(each))
    assert evaluate_external(federation, state, ["a"], "test") == {}
    assert evaluate_external(federation, state, [], "validation") == {}


# Rounds and rates


def test_events_come_in_order() -> None:
    federation = tiny_federation(rounds=replace(ROUNDS, num_rounds=1))
    kinds = [type(event).__name__ for event in run_rounds(federation, initial_state(federation))]
    assert kinds == ["RoundStarted", *["ClientTrained"] * 4, *["ClientEvaluated"] * 4, "RoundFinished"]
    first = next(iter(run_rounds(federation, initial_state(federation))))
    assert first == RoundStarted(1, CLIENTS)


def test_the_rate_of_the_schedule_is_the_one_that_trains() -> None:
    warm = run_all(tiny_federation(rounds=replace(ROUNDS, num_rounds=2, warmup_rounds=2, learning_rate=0.1)))
    half = run_all(tiny_federation(rounds=replace(ROUNDS, num_rounds=2, learning_rate=0.05)))
    assert same_state(warm.states[1], half.states[1])
    assert not same_state(warm.states[2], half.states[2])


def test_a_finished_federation_has_no_more_events() -> None:
    federation = tiny_federation()
    assert list(run_rounds(federation, run_all(federation).states[-1])) == []


def test_states_of_earlier_rounds_stay_as_they_were() -> None:
    federation = tiny_federation(rounds=replace(ROUNDS, num_rounds=3))
    copies: list[dict[str, Tensor]] = []
    states: list[FederationState] = []
    for event in run_rounds(federation, initial_state(federation)):
        if isinstance(event, RoundFinished):
            states.append(event.state)
            copies.append({name: tensor.clone() for name, tensor in event.state.server.shared.items()})
    assert all(equal(state.server.shared, copy) for state, copy in zip(states, copies, strict=True))
