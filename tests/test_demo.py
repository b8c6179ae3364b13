"""The demonstration: its matched setting, its data, and a conclusion that follows from results.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sfedlora.data.files import read_file
from sfedlora.demo import (
    TASKS,
    conclusion,
    demo_cells,
    demo_rows,
    loss_drop,
    matched_alpha,
    prepare_data,
    recorded_sweep,
)
from sfedlora.errors import DataError, InputError
from support.command_line import sfedlora


def line(cell: str, start: float, last: float) -> dict[str, object]:
    def both(loss: float) -> dict[str, object]:
        return {"test": {"weighted": {"eval_loss": loss}}}

    return {"cell": cell, "summary": {"initial": both(start), "last": both(last)}}


def lines(**drops: float) -> list[dict[str, object]]:
    names = {"shared": "rslora + shared"}
    return [line(names.get(name, name), 4.0, 4.0 * (1.0 - drop)) for name, drop in drops.items()]


def test_all_rules_have_one_gamma_at_the_matched_point() -> None:
    assert matched_alpha("lora") / 8 == pytest.approx(2.0)
    assert matched_alpha("rslora") / math.sqrt(8) == pytest.approx(2.0)
    assert matched_alpha("sfed") * math.sqrt(2 / 8) == pytest.approx(2.0)


def test_gammas_at_the_point_of_the_demonstration(tmp_path: Path) -> None:
    alphas = {row.label: matched_alpha(row.scaling) for row in demo_rows()}
    assert alphas["lora"] / 128 == pytest.approx(0.125)
    assert alphas["rslora"] / math.sqrt(128) == pytest.approx(0.5)
    assert alphas["sfed"] * math.sqrt(8 / 128) == pytest.approx(1.0)
    rates = {cell.config.local.learning_rate for cell in demo_cells(TASKS["quick"], tmp_path / "data.jsonl", tmp_path)}
    assert rates == {recorded_sweep("quick")["best_learning_rate"] / 4}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_recorded_learning_rate_is_the_best_of_its_sweep_and_inside_the_grid(task: str) -> None:
    sweep = recorded_sweep(TASKS[task].name)
    losses = {float(rate): loss for rate, loss in sweep["validation_loss_by_learning_rate"].items() if loss is not None}
    assert sweep["best_learning_rate"] == min(losses, key=lambda rate: losses[rate])
    assert min(losses) < sweep["best_learning_rate"] < max(losses)
    assert (sweep["num_rounds"], sweep["local_steps"], sweep["batch_size"]) == (
        TASKS[task].num_rounds,
        TASKS[task].local_steps,
        TASKS[task].batch_size,
    )


def test_every_client_has_the_same_number_of_examples(tmp_path: Path) -> None:
    columns = read_file(prepare_data(TASKS["quick"], tmp_path, 8))
    clients = list(columns["client"])
    assert {clients.count(client) for client in clients} == {60}
    assert len(set(clients)) == 8


def test_more_clients_than_topics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8 clients have 60 examples, expected 9"):
        prepare_data(TASKS["quick"], tmp_path, 9)


def test_sentiment_without_its_archive_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hutto_ICWSM_2014\.tar\.gz.*--data-dir"):
        prepare_data(TASKS["sentiment"], tmp_path, 8, tmp_path)


def test_conclusion_when_sfed_is_first() -> None:
    text = conclusion(lines(sfed=0.3, rslora=0.2, lora=0.1, shared=0.15, local=0.05))
    assert "Largest loss drop: sfed (+30.0%" in text
    assert "sfed learned more than rslora, lora, rslora + shared, local." in text
    assert "sfed > rslora > lora holds" in text
    assert "rival" not in text


def test_conclusion_when_sfed_loses() -> None:
    text = conclusion(lines(sfed=0.1, rslora=0.2, lora=0.05, shared=0.3, local=0.102))
    assert "Largest loss drop: rslora + shared (+30.0%" in text
    assert "sfed learned more than lora." in text
    assert "sfed learned about as much as local." in text
    assert "sfed learned less than rslora, rslora + shared." in text
    assert "sfed > rslora > lora does not hold" in text
    assert "sfed did not beat it here" in text


def test_conclusion_when_everything_gets_worse() -> None:
    text = conclusion(lines(sfed=-0.5, rslora=-0.1, lora=-0.01, shared=-0.2, local=-0.3))
    assert "Largest loss drop: lora (-1.0%" in text
    assert "does not hold" in text


def test_quick_demonstration_says_what_its_results_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = sfedlora(capsys, "demo", "--quick", "--output", str(tmp_path / "demo"))
    assert outcome.code == 0, outcome.err
    results = [json.loads(text) for text in (tmp_path / "demo" / "results.jsonl").read_text().splitlines()]
    assert [result["cell"] for result in results] == ["sfed", "rslora", "lora", "rslora + shared", "local"]
    # derived here from the numbers alone, without the code that words the conclusion
    drops = {}
    for result in results:
        start = result["summary"]["initial"]["test"]["weighted"]["eval_loss"]
        drops[result["cell"]] = (start - result["summary"]["last"]["test"]["weighted"]["eval_loss"]) / start
        assert loss_drop(result) == pytest.approx(drops[result["cell"]])
        assert f"{drops[result['cell']]:+.1%}" in outcome.out
        assert f"{result['settings']['gamma']:.4g}" in outcome.out
    said = " ".join(outcome.out.split())
    assert f"Largest loss drop: {max(drops, key=lambda cell: drops[cell])}" in said
    in_order = drops["sfed"] > drops["rslora"] > drops["lora"]
    assert ("sfed > rslora > lora holds" in said) <= in_order
    assert ("sfed did not beat it here" in said) >= (drops["sfed"] <= drops["rslora + shared"])
    assert "before:" in said
    assert "after:" in said
    for figure in ("rounds.png",):
        assert (tmp_path / "demo" / "figures" / figure).stat().st_size > 10_000
    again = sfedlora(capsys, "demo", "--quick", "--output", str(tmp_path / "demo"))
    assert again.code == 0
    assert again.err.count("skipped") == 5
