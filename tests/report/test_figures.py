"""Figures as files: which are drawn from which directories, that they hold a picture, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sfedlora.config.presets import PRESETS
from sfedlora.errors import InputError, StorageError
from sfedlora.report import draw_comparison, draw_directories, draw_run, load_cells
from support.comparison_files import write_comparison
from support.run_files import write_run


def ink(path: Path) -> float:
    """Share of pixels that are not white."""
    with Image.open(path) as image:
        return float((np.asarray(image.convert("L")) < 250).mean())


def test_a_run_gets_metrics_and_gradients(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", losses=[3.0, 2.5], norms=[1.0, 0.5], initial=3.5)
    figures = draw_run(path)
    assert figures == [path / "figures" / "metrics.png", path / "figures" / "gradients.png"]
    assert all(0.01 < ink(figure) < 0.5 for figure in figures)


def test_a_run_without_gradients_has_no_gradient_figure(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", losses=[3.0], norms=[0.0], initial=None)
    assert [figure.name for figure in draw_run(path)] == ["metrics.png"]


def test_a_comparison_is_drawn_per_round_against_rank_and_against_clients(tmp_path: Path) -> None:
    figures = draw_directories([write_comparison(tmp_path / "grid", seeds=(0, 1))])
    assert [figure.name for figure in figures] == ["rounds.png", "rank.png", "clients.png"]
    assert all(0.01 < ink(figure) < 0.5 for figure in figures)


def test_axes_without_data_are_not_drawn(tmp_path: Path) -> None:
    one_size = write_comparison(tmp_path / "one", ranks=(8,), clients=(2,))
    assert [figure.name for figure in draw_directories([one_size])] == ["rounds.png"]
    only_ranks = write_comparison(tmp_path / "ranks", clients=(2,))
    assert [figure.name for figure in draw_directories([only_ranks], tmp_path / "out")] == ["rounds.png", "rank.png"]
    assert (tmp_path / "out" / "rank.png").is_file()


def test_many_sizes_go_to_several_pages(tmp_path: Path) -> None:
    grid = write_comparison(tmp_path / "grid", ranks=(1, 2, 4, 8, 16), clients=(2,))
    assert [figure.name for figure in draw_directories([grid])] == ["rounds.png", "rounds-2.png", "rank.png"]


def test_several_runs_are_compared_without_results(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, losses=[3.0, 2.0], norms=[1.0, 1.0], initial=3.5, scaling=name)
        for name in ("lora", "sfed")
    ]
    assert tmp_path / "figures" / "rounds.png" in draw_directories(runs)


def test_cells_whose_runs_are_gone_keep_the_figures_from_their_summaries(tmp_path: Path) -> None:
    cells = load_cells(write_comparison(tmp_path / "grid") / "results.jsonl")
    for cell in cells:
        (cell.run_dir / "config.yaml").unlink()
    assert [figure.name for figure in draw_comparison(cells, tmp_path / "out")] == ["rank.png", "clients.png"]


def test_fourteen_presets_look_different_in_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for at, (name, rule) in enumerate(PRESETS.items()):
        run = write_run(tmp_path / name, losses=[3.0 - 0.1 * at, 2.0], norms=[1.0 + at, 1.0], initial=3.5)
        settings = {f"{section}.{key}": value for section, keys in rule.items() for key, value in keys.items()}
        settings |= {"preset": name, "lora.rank": 8, "partition.num_clients": 4, "seed": 0}
        lines.append(json.dumps({"cell": name, "settings": settings, "run_dir": str(run), "summary": {}}) + "\n")
    (tmp_path / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    drawn: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    assert [path.name for path in draw_directories([tmp_path])] == ["rounds.png"]
    (figure,) = drawn
    for axes in figure.axes:
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
        assert len(looks) == len(PRESETS)
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == list(PRESETS)
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cells"):
        draw_comparison([], tmp_path)
    with pytest.raises(InputError, match="no directory was given"):
        draw_directories([])
    with pytest.raises(InputError, match="no run directory"):
        draw_directories([tmp_path])
    (tmp_path / "results.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(StorageError, match="line 1"):
        draw_directories([tmp_path])


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    (path / "figures").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match="figures"):
        draw_run(path)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run", losses=[3.0], norms=[1.0], initial=None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'sfedlora\[report\]'"):
        draw_run(path)
