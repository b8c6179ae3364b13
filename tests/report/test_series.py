"""Grouping of cells into lines: hand-written cells, hand-computed means and spreads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfedlora.report import CellRecord
from sfedlora.report.series import by_size, lines_against, lines_by_round, method_label, run_label, varying_keys


def cell(value: float, **settings: Any) -> CellRecord:
    names = {"rank": "lora.rank", "clients": "partition.num_clients", "scaling": "lora.scaling", "seed": "seed"}
    base = {"method.name": "fedsa", "lora.init": "independent", "gamma": value}
    full = base | {names.get(key, key): setting for key, setting in settings.items()}
    return CellRecord("c", full, Path("none"), {"value": value})


def value_of(record: CellRecord) -> float:
    return float(record.summary["value"])


def test_seeds_become_mean_and_spread() -> None:
    cells = [
        cell(value, scaling="sfed", rank=rank, clients=4, seed=seed)
        for rank, seed, value in [(8, 0, 1.0), (8, 1, 3.0), (32, 0, 5.0), (32, 1, 6.0)]
    ]
    (line,) = lines_against("lora.rank", cells, value_of)
    assert line.method == "sfed, independent init"
    assert line.size == ""
    assert line.points == ((8.0, 2.0, 1.0, 3.0), (32.0, 5.5, 5.0, 6.0))


def test_one_line_per_method_and_number_of_clients() -> None:
    cells = [
        cell(float(rank), scaling=scaling, rank=rank, clients=clients, seed=0)
        for scaling in ("lora", "sfed")
        for clients in (16, 4)
        for rank in (8, 32)
    ]
    lines = lines_against("lora.rank", cells, value_of)
    assert [(line.method.split(",")[0], line.size) for line in lines] == [
        ("lora", "N = 4"),
        ("lora", "N = 16"),
        ("sfed", "N = 4"),
        ("sfed", "N = 16"),
    ]


def test_a_single_size_or_no_value_gives_no_line() -> None:
    cells = [cell(1.0, scaling="sfed", rank=8, clients=4), cell(1.0, scaling="lora", rank=8, clients=4)]
    assert lines_against("lora.rank", cells, value_of) == []
    two = [cell(1.0, scaling="sfed", rank=8), cell(1.0, scaling="sfed", rank=16)]
    assert lines_against("lora.rank", two, lambda _: None) == []


def test_labels_name_what_differs_and_nothing_that_follows_from_it() -> None:
    cells = [
        cell(1.0, scaling="sfed", rank=8, **{"local.learning_rate": 0.1}),
        cell(2.0, scaling="sfed", rank=8, **{"local.learning_rate": 0.01}),
    ]
    assert varying_keys(cells) == ["local.learning_rate"]
    assert method_label(cells[1].settings, varying_keys(cells)) == "sfed, independent init, lr = 0.01"
    assert run_label(cells[0].settings) == "fedsa: sfed, independent init, r = 8"


def test_rounds_are_grouped_by_size_in_order() -> None:
    cells = [cell(1.0, scaling=s, rank=r) for s in ("lora", "sfed") for r in (128, 8)]
    groups = by_size(cells, varying_keys(cells))
    assert list(groups) == ["r = 8", "r = 128"]
    lines = lines_by_round(groups["r = 8"], varying_keys(cells), lambda record: [(1.0, value_of(record))])
    assert [line.method for line in lines] == ["lora, independent init", "sfed, independent init"]


def preset_cell(name: str, **settings: Any) -> CellRecord:
    rules = {
        "fedit": ("fedit", "lora", "shared"),
        "fedsa-lora": ("fedsa", "lora", "shared"),
        "sfed-lora": ("fedsa", "sfed", "independent"),
    }
    rule = dict(zip(("method.name", "lora.scaling", "lora.init"), rules[name], strict=True))
    return cell(1.0, preset=name, **(rule | settings))


def test_presets_that_differ_are_called_by_their_names() -> None:
    cells = [
        preset_cell("fedit", rank=8, **{"rounds.proximal_mu": 0.0}),
        preset_cell("sfed-lora", rank=8, **{"rounds.proximal_mu": 0.5}),
        preset_cell("sfed-lora", rank=8, **{"rounds.proximal_mu": 0.0, "method.name": "local"}),
        cell(1.0, rank=8, **{"lora.scaling": "lora", "rounds.proximal_mu": 0.0}),
    ]
    varying = varying_keys(cells)
    assert [method_label(item.settings, varying) for item in cells] == [
        "fedit, proximal mu = 0",
        "sfed-lora, proximal mu = 0.5",
        "local: sfed, independent init, proximal mu = 0",
        "fedsa: lora, independent init, proximal mu = 0",
    ]


def test_one_preset_for_all_cells_is_no_label() -> None:
    cells = [preset_cell("sfed-lora"), preset_cell("sfed-lora", **{"lora.scaling": "lora"})]
    labels = [method_label(item.settings, varying_keys(cells)) for item in cells]
    assert labels == ["sfed, independent init", "lora, independent init"]


def test_lists_of_ranks_have_short_labels_and_never_share_one() -> None:
    lists = [[2, 4, 8], [2] * 9 + [4], [2] * 5 + [4] * 5, [4] * 5 + [2] * 5, list(range(1, 31)), list(range(30, 0, -1))]
    cells = [cell(1.0, scaling="sfed", rank=rank) for rank in [16, *lists]]
    groups = by_size(cells, varying_keys(cells))
    assert list(groups) == [
        "r = 16",
        "r = 1 to 30 (30 clients)",
        "r = 9 x 2 + 1 x 4",
        "r = 5 x 2 + 5 x 4",
        "r = [2, 4, 8]",
        "r = 5 x 2 + 5 x 4 #2",
        "r = 1 to 30 (30 clients) #2",
    ]
    assert all(len(members) == 1 for members in groups.values())
    assert run_label(cells[3].settings) == "fedsa: sfed, independent init, r = 5 x 2 + 5 x 4"


def test_a_list_of_ranks_has_no_place_on_the_axis_of_ranks() -> None:
    cells = [cell(float(at), scaling="sfed", rank=rank) for at, rank in enumerate([2, [2, 4], 4])]
    (line,) = lines_against("lora.rank", cells, value_of)
    assert [point[0] for point in line.points] == [2.0, 4.0]
