"""The scaling law of SFed-LoRA, measured on the real code.

Log-log slopes of |grad B| at the first step of round 2 against rank and number of clients, as in the table of the
theory: with independent draws that are averaged before round 1, `sfed` is flat in both. The fast tests run federations
on a linear toy; the slow ones take the tiny language model and MiniLM. The settings follow from the theory (SGD, a
learning rate at which five local steps change little) and were not tuned.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import theory_oracle
from sfedlora import RunConfig, run
from sfedlora.data.corpora import hutto_rows, write_jsonl
from sfedlora.federation.initialize import Initialization
from sfedlora.federation.round import RoundFinished, evaluate_clients, run_rounds
from sfedlora.federation.state import initial_state
from sfedlora.lora.inject import adapt
from sfedlora.lora.scaling import ScalingRule
from sfedlora.methods import aggregate, make_method
from sfedlora.setup import prepare
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Update, select_parts
from support.real_files import MINILM, hutto_archive, require_minilm
from support.tiny_federation import run_all
from theory.toy import LinearModel, LinearModelConfig, linear_federation

pytestmark = pytest.mark.filterwarnings("ignore:rank .* is above min:UserWarning")

RANKS, CLIENTS, SEEDS = (8, 64, 512), (4, 8, 32), (0, 1)
LAW: dict[ScalingRule, tuple[float, float]] = {"lora": (-0.5, -0.5), "rslora": (0.0, -0.5), "sfed": (0.0, 0.0)}
RULES: tuple[ScalingRule, ...] = ("sfed", "rslora", "lora")


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@functools.cache
def round_2(
    rule: ScalingRule,
    num_clients: int,
    rank: int,
    *,
    init: Initialization = "independent",
    count: Literal["effective", "total"] = "effective",
    shares: tuple[int, ...] | None = None,
) -> tuple[float, float]:
    """|grad B| at the first step of round 2 and gain, means over seeds."""
    lines = [
        run_all(linear_federation(rule, init, num_clients, rank, count=count, shares=shares, seed=seed)).records[1]
        for seed in SEEDS
    ]
    return float(np.mean([line["grad_norm_b"] for line in lines])), float(np.mean([line["gain"] for line in lines]))


@pytest.mark.parametrize("rule", RULES)
def test_slopes_of_the_gradient_of_b(rule: ScalingRule) -> None:
    over_rank = [round_2(rule, 8, rank)[0] for rank in RANKS]
    over_clients = [round_2(rule, num_clients, 32)[0] for num_clients in CLIENTS]
    assert slope(RANKS, over_rank) == pytest.approx(LAW[rule][0], abs=0.08)
    assert slope(CLIENTS, over_clients) == pytest.approx(LAW[rule][1], abs=0.08)


@pytest.mark.parametrize("rule", RULES)
def test_slopes_agree_with_the_numpy_oracle(rule: ScalingRule) -> None:
    ranks = RANKS[:2]
    ours = [round_2(rule, 8, rank)[0] for rank in ranks]
    theirs = [theory_oracle.simulate(rule, "independent", 8, rank).grad_norms_b[1] for rank in ranks]
    assert slope(ranks, ours) == pytest.approx(slope(ranks, theirs), abs=0.08)


def test_gain_is_constant_under_sfed_and_under_no_other_rule() -> None:
    gains = [round_2("sfed", num_clients, rank)[1] for num_clients, rank in product(CLIENTS, (64, 512))]
    assert max(gains) / min(gains) < 1.1
    assert round_2("rslora", 4, 32)[1] == pytest.approx(8 * round_2("rslora", 32, 32)[1], rel=0.1)
    assert round_2("lora", 8, 64)[1] == pytest.approx(8 * round_2("lora", 8, 512)[1], rel=0.1)


def test_one_shared_draw_makes_sfed_with_plain_n_too_large() -> None:
    over_clients = [round_2("sfed", num_clients, 32, init="shared", count="total")[0] for num_clients in CLIENTS]
    assert slope(CLIENTS, over_clients) == pytest.approx(0.5, abs=0.08)
    effective = [round_2("sfed", num_clients, 32, init="shared")[0] for num_clients in CLIENTS]
    assert slope(CLIENTS, effective) == pytest.approx(0.0, abs=0.08)


def test_the_effective_count_makes_unequal_weights_look_uniform() -> None:
    shares = tuple(round(60 / number) for number in range(1, 21))
    uniform = round_2("sfed", 20, 64)[0]
    effective = round_2("sfed", 20, 64, shares=shares)[0]
    total = round_2("sfed", 20, 64, count="total", shares=shares)[0]
    assert effective == pytest.approx(uniform, rel=0.05)
    assert total > 1.4 * uniform


@pytest.mark.parametrize("seed", SEEDS)
def test_one_small_learning_rate_orders_the_rules_on_the_toy(seed: int) -> None:
    drops = []
    for rule in RULES:
        federation = linear_federation(rule, "independent", 16, 128, num_rounds=6, seed=seed)
        before = [result.loss for _, _, result in evaluate_clients(federation, initial_state(federation), "test", ())]
        drops.append(float(np.mean(before)) - run_all(federation).records[-1]["eval_loss"])
    assert drops[0] > drops[1] > drops[2] > 0


@pytest.mark.parametrize("init", ["independent", "shared"])
@pytest.mark.parametrize("rule", RULES)
def test_layers_and_server_step_compute_what_the_numpy_oracle_computes(rule: ScalingRule, init: Any) -> None:
    num_clients, rank, rounds, steps, rate = 3, 16, 3, 4, 0.002
    toy = theory_oracle.draw_toy(num_clients)
    weights = np.array([0.5, 0.3, 0.2])
    examples = {"0": 50, "1": 30, "2": 20}
    scaling = theory_oracle.gamma(rule, 4.0, rank, theory_oracle.effective_count(weights))
    start = theory_oracle.first_a(init, theory_oracle.draw_a(num_clients, rank, 32), weights)
    expected = theory_oracle.train(toy, start, scaling, weights, num_rounds=rounds, num_steps=steps, learning_rate=rate)

    resident = adapt(LinearModel(LinearModelConfig()), target_modules=("linear",), rank=rank)
    resident.scaling = scaling
    method = make_method("fedsa")
    state = ServerState(0, {"a:linear": torch.tensor(start[0], dtype=torch.float32)}, {})
    own = {client: {"b:linear": torch.zeros(32, rank)} for client in examples}
    norms = np.zeros((rounds, num_clients))
    for round_num in range(1, rounds + 1):
        updates = []
        for client, num_examples in examples.items():
            resident.load({**state.shared, **own[client]})
            flats = [torch.nn.Parameter(resident.flat(part)) for part in (Part.A, Part.B)]
            for flat, part in zip(flats, (Part.A, Part.B), strict=True):
                flat.grad = resident.flat_grad(part)
            optimizer = torch.optim.SGD(flats, lr=rate)
            x, y = (torch.tensor(values[int(client)], dtype=torch.float32) for values in (toy.inputs, toy.targets))
            for step in range(steps):
                resident.zero_grad()
                loss = 0.5 * (resident.model.linear(x) - y).square().sum(1).mean()
                loss.backward()
                if step == 0:
                    norms[round_num - 1, int(client)] = float(torch.linalg.vector_norm(resident.flat_grad(Part.B)))
                optimizer.step()
            own[client] = resident.read([Part.B])
            updates.append(Update(client, round_num, num_examples, resident.read([Part.A])))
        state = aggregate(method, state, updates, weighting="examples", sizes=LoraSizes(LoraSize(rank, scaling)))

    np.testing.assert_allclose(norms.mean(1), expected.grad_norms_b, rtol=1e-5)
    np.testing.assert_allclose(state.shared["a:linear"].numpy(), expected.a, atol=1e-5 * np.abs(expected.a).max())
    for client in examples:
        ours, theirs = own[client]["b:linear"].numpy(), expected.b[int(client)]
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert select_parts(state.shared, [Part.B]) == {}


# The tiny language model


def tiny_run(rule: ScalingRule, seed: int, output: Path) -> float:
    """Drop of the validation loss of a short run on eight chat topics."""
    values = {
        "model": {"source": "package:sfedlora/assets/tiny_llama"},
        "data": {"source": "package:sfedlora/assets/tiny_chat.jsonl", "template": "chat"},
        "partition": {"scheme": "column", "column": "topic"},
        "lora": {"rank": 32, "alpha": 16.0, "scaling": rule, "init": "independent"},
        "rounds": {"num_rounds": 5, "weighting": "uniform"},
        "local": {"optimizer": "sgd", "learning_rate": 1e-3, "local_steps": 5, "batch_size": 8},
        "evaluation": {"every": 5},
        "threads": 1,
        "seed": seed,
        "output": str(output),
    }
    summary = run(RunConfig.from_mapping(values)).summary
    before, after = (summary[when]["validation"]["unweighted"]["eval_loss"] for when in ("initial", "last"))
    return float(before - after)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_small_learning_rate_orders_the_rules_on_the_tiny_model(seed: int, tmp_path: Path) -> None:
    drops = {rule: tiny_run(rule, seed, tmp_path / rule) for rule in RULES}
    print(f"seed {seed}, drop of the validation loss: {drops}")
    assert drops["sfed"] > drops["rslora"] > drops["lora"] > 0


# MiniLM


def minilm_round_2(rule: ScalingRule, num_clients: int, rank: int, source: Path) -> float:
    """|grad B| at the first step of round 2."""
    values = {
        "model": {"source": MINILM, "task": "sequence-classification", "dtype": "float32"},
        "data": {"source": str(source), "max_length": 48},
        "partition": {"scheme": "iid", "num_clients": num_clients},
        "lora": {"rank": rank, "alpha": 4.0, "scaling": rule, "init": "independent"},
        "rounds": {"num_rounds": 2, "weighting": "uniform"},
        "local": {"optimizer": "sgd", "learning_rate": 1e-3, "local_steps": 2, "batch_size": 8},
        "evaluation": {"every": 2, "clients": 1},
        "threads": 1,
        "output": "unused",
    }
    federation = prepare(RunConfig.from_mapping(values)).federation
    lines = [
        event.record for event in run_rounds(federation, initial_state(federation)) if isinstance(event, RoundFinished)
    ]
    return float(lines[1]["grad_norm_b"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_the_law_on_minilm(rule: ScalingRule, tmp_path: Path) -> None:
    require_minilm()
    rows = hutto_rows(hutto_archive())
    rows = rows[:: len(rows) // 640][:640]
    parts = [tmp_path / f"{part}.jsonl" for part in range(8)]
    for part, path in enumerate(parts):
        write_jsonl(rows[part::8], path)
    write_jsonl(rows, tmp_path / "all.jsonl")
    ranks, clients = (4, 16, 64), (8, 64)
    over_rank = [minilm_round_2(rule, 8, rank, parts[0]) for rank in ranks]
    # 64 clients, and eight times 8 clients on the same sentences: 8 training sentences a client, one batch, in both.
    eight = float(np.mean([minilm_round_2(rule, 8, 16, path) for path in parts]))
    over_clients = [eight, minilm_round_2(rule, 64, 16, tmp_path / "all.jsonl")]
    measured = slope(ranks, over_rank), slope(clients, over_clients)
    print(f"{rule}: slope in rank {measured[0]:+.3f}, in clients {measured[1]:+.3f}")
    assert measured == pytest.approx(LAW[rule], abs=0.12)
