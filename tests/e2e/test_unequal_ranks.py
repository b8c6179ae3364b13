"""One rank per client, from the command line: what is written, and that stock PEFT gives back what was evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sfedlora.methods import METHODS
from support.command_line import sfedlora, write_config
from support.served import Served
from support.stock import causal_model, logits_of, plain_encoding, response_loss, rows_of, tokenizer_of

Capsys = pytest.CaptureFixture[str]
CHAT = Path(__file__).parents[2] / "src" / "sfedlora" / "assets" / "tiny_chat.jsonl"
RANKED = [name for name, method in METHODS.items() if method().traits.heterogeneous_ranks]
RANKS = (5, 2, 3)
ALPHA = 6


def _config(folder: Path, **sections: object) -> Path:
    return write_config(
        folder / "run.yaml",
        preset=None,
        rounds={"num_rounds": 3},
        lora={"rank": list(RANKS), "alpha": ALPHA, "scaling": "lora", "init": "shared", "target_modules": ["v_proj"]},
        output=str(folder / "run"),
        **sections,
    )


def _clients(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "partition.json").read_text(encoding="utf-8"))["clients"]
    return content


def _rank_written(adapter: Path) -> int:
    rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {rank}
    return rank


def test_the_methods_that_take_a_rank_per_client() -> None:
    assert set(RANKED) >= {"fedsa", "flora", "flexlora", "hetlora", "local"}


@pytest.mark.parametrize("method", RANKED)
def test_every_client_has_its_own_rank_and_gamma(method: str, tmp_path: Path, capsys: Capsys) -> None:
    config, run_dir = _config(tmp_path), tmp_path / "run"
    outcome = sfedlora(capsys, "run", config, f"method.name={method}")
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err
    clients = _clients(run_dir)
    ranks = dict(zip(clients, RANKS, strict=True))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        assert line["scaling"] == pytest.approx({client_id: ALPHA / rank for client_id, rank in ranks.items()})
    assert (
        lines[-1]["eval_loss"]
        < json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["initial"]["validation"]["weighted"][
            "eval_loss"
        ]
    )
    served, rows = Served.load(run_dir), rows_of(CHAT)
    joined = 32 if method == "flora" else 0  # three rounds of ten columns are the whole matrix of (32, 64)
    for client_id, facts in clients.items():
        adapter = run_dir / "adapters" / "clients" / facts["dir"]
        assert _rank_written(adapter) == ranks[client_id] + joined
        encoded = [plain_encoding(rows[row], tokenizer_of(adapter), 48) for row in facts["validation"]]
        model, inputs = causal_model(adapter), [ids for ids, _ in encoded]
        theirs = logits_of(model, inputs)
        largest = max(float(logits.abs().max()) for logits in theirs)
        for ours, stock in zip(served.logits(client_id, inputs), theirs, strict=True):
            assert float((ours - stock).abs().max()) <= 1e-5 * largest
        assert response_loss(model, encoded) == pytest.approx(lines[-1]["clients"][client_id]["eval_loss"], rel=1e-5)
    shared = run_dir / "adapters" / "shared"
    assert _rank_written(shared) == max(RANKS) + joined
    causal_model(shared)
    target = tmp_path / "merged"
    assert sfedlora(capsys, "export", run_dir, target, "--merged", "--client", client_id).code == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(target).eval(), inputs)
    assert all(float((a - b).abs().max()) <= 1e-5 * largest for a, b in zip(merged, theirs, strict=True))


def test_gamma_of_sfed_uses_each_rank_and_one_count(tmp_path: Path, capsys: Capsys) -> None:
    overrides = ["preset=sfed-lora", "lora.scaling=sfed", "lora.init=independent", "rounds.weighting=uniform"]
    assert sfedlora(capsys, "run", _config(tmp_path), *overrides).code == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["effective_clients"] == pytest.approx(3)
    assert list(line["scaling"].values()) == pytest.approx([ALPHA * math.sqrt(3 / rank) for rank in RANKS])


def test_drawn_ranks_come_from_the_seed_and_the_list(tmp_path: Path, capsys: Capsys) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        folder = tmp_path / name
        folder.mkdir()
        overrides = ["method.name=hetlora", "lora.rank_assignment=drawn", "lora.rank=[2,3,5,7]", f"seed={seed}"]
        outcome = sfedlora(
            capsys,
            "run",
            _config(folder),
            *overrides,
            "partition={scheme: iid, num_clients: 12}",
            "rounds.num_rounds=1",
        )
        assert outcome.code == 0, outcome.err
        run_dir = folder / "run"
        drawn.append(
            [_rank_written(run_dir / "adapters" / "clients" / facts["dir"]) for facts in _clients(run_dir).values()]
        )
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) <= {2, 3, 5, 7}
    assert len(set(drawn[0])) > 1


@pytest.mark.parametrize("method", RANKED)
def test_a_cohort_without_the_largest_rank(method: str, tmp_path: Path, capsys: Capsys) -> None:
    """Two of six clients a round: most cohorts lack the one client of rank 8, whose rows must survive."""
    overrides = ["lora.rank=[2,2,2,2,2,8]", "partition={scheme: iid, num_clients: 6}", "rounds.cohort_size=2"]
    outcome = sfedlora(capsys, "run", _config(tmp_path), f"method.name={method}", *overrides, "rounds.num_rounds=4")
    assert outcome.code == 0, outcome.err
    run_dir = tmp_path / "run"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = list(_clients(run_dir))[-1]
    assert not all(last in line["cohort"] for line in lines)
    assert all(math.isfinite(line["eval_loss"]) for line in lines)
    assert all(not line["excluded"] for line in lines)
    shared = load_file(run_dir / "adapters" / "shared" / "adapter_model.safetensors")
    for name, tensor in shared.items():
        if "lora_A" in name:
            assert tensor[:8].abs().sum(dim=1).min() > 0, "a row of A with no values could never train again"


REFUSED = {
    "too few": (["method.name=flora", "lora.rank=[2,4]"], "lora.rank: 2 ranks for 3 clients"),
    "too many": (["method.name=flora", "lora.rank=[2,4,4,4]"], "lora.rank: 4 ranks for 3 clients"),
    "too few for the data": (
        ["method.name=flora", "partition={scheme: column, column: topic}"],
        "lora.rank: 3 ranks for 8 clients; give one for each, in the order ai, conversations, emotion-1",
    ),
    "a method that cannot": (["method.name=fedex"], "lora.rank: method 'fedex' needs one rank for all clients"),
    "drawn, and the method cannot": (["method.name=fair", "lora.rank_assignment=drawn"], "needs one rank for all"),
    "drawn from one number": (
        ["method.name=flora", "lora.rank_assignment=drawn", "lora.rank=4"],
        "lora.rank_assignment: drawn needs a list in lora.rank to draw from, got 4",
    ),
    "no rank": (["method.name=flora", "lora.rank=[]"], "lora.rank"),
    "rank 0": (["method.name=flora", "lora.rank=[2,0,3]"], "lora.rank: input should be greater than 0, got 0"),
    "half a rank": (
        ["method.name=flora", "lora.rank=[2,2.5,3]"],
        "lora.rank: input should be a valid integer",
    ),
    "above the module": (["method.name=flexlora", "lora.rank=[2,3,33]"], "lora.rank: 33 is above min(in_features"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ranks_that_do_not_fit_are_refused(case: str, tmp_path: Path, capsys: Capsys) -> None:
    overrides, message = REFUSED[case]
    outcome = sfedlora(capsys, "run", _config(tmp_path), *overrides)
    assert outcome.code == 2
    errors = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (tmp_path / "run").exists()
