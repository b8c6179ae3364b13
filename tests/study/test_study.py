"""The study on a tiny model: runs leave lines, are taken up where they stopped, become figures and a page.

Also: what is planned, and that the published page is what its raw data say.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from study.data import LABELS, Dialogue, Sentences, prepare_dialogue, prepare_sentences
from study.definition import CROSS, GRID_POINTS, RULES, SIZES, Planned, alpha_of, config_of, plan
from study.figures import DOCS, FIGURES, PAGE, RESULTS, draw_study
from study.page import study_page
from study.readings import comparable, diverged, line_over, loss_change, read_study, slope
from study.run import best_rate, estimate_seconds, run_study

from sfedlora.errors import DataError, InputError
from sfedlora.lora.base_model import load_base_model
from support.sentiment import sentiment_rows, write_sentiment

STEMS = {"products": "amazonReviewSnippets", "movies": "movieReviewSnippets", "editorials": "nytEditorialSnippets"}
TINY = Sentences(most_words=5, num_public=32, num_new=12, num_rows=96)


def write_archive(path: Path) -> Path:
    """The sentiment rows in the layout of the real archive, with one long sentence more."""
    rows = [*sentiment_rows(), {"text": "one two three four five six", "label": "positive", "domain": "tweets"}]
    with tarfile.open(path, "w:gz") as archive:
        for domain in ("products", "movies", "editorials", "tweets"):
            own = [row for row in rows if row["domain"] == domain]
            lines = [f"1_1\t{2.0 if row['label'] == 'positive' else -2.0}\t{row['text']}" for row in own]
            raw = "\n".join(lines).encode()
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{STEMS.get(domain, domain)}_GroundTruth.txt")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def write_dialogue(path: Path) -> Path:
    """Three speakers who answer one another, in the layout of the real data set."""
    turns = [[{"sender": f"s{at % 3}", "text": f"this is the reply with number {at}"}] for at in range(91)]
    path.write_text(json.dumps({"talk": {"messages": turns}}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("study")
    write_sentiment(folder)
    sentences = prepare_sentences(
        write_archive(folder / "h.tar.gz"), folder / "sentences", TINY, encoder=str(folder / "model")
    )
    source = str(write_dialogue(folder / "dataset.json"))
    dialogue = prepare_dialogue(folder / "dialogue", [2], Dialogue(num_new=1, num_rows=20), source=source)
    return {"sentences": sentences, "dialogue": dialogue | {"chat": "package:sfedlora/assets/tiny_llama"}}


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_sentences_are_short_and_in_one_file_only(paths: dict[str, dict[str, str]]) -> None:
    files = {name: rows_of(path) for name, path in paths["sentences"].items() if name != "minilm"}
    assert {name: len(rows) for name, rows in files.items()} == {
        "sentences": 96,
        **{f"new-{domain}": 12 for domain in ("editorials", "movies", "products", "tweets")},
    }
    texts = Counter(row["text"] for rows in files.values() for row in rows)
    assert max(texts.values()) <= max(Counter(row["text"] for row in sentiment_rows()).values())
    assert all(len(text.split()) <= 5 for text in texts)
    assert {row["domain"] for row in files["new-movies"]} == {"movies"}


def test_the_fitted_head_knows_the_labels_and_the_rest_is_untouched(paths: dict[str, dict[str, str]]) -> None:
    fitted, encoder = (
        load_base_model(source, task="sequence-classification", num_labels=2, label_names=LABELS)
        for source in (paths["sentences"]["minilm"], str(Path(paths["sentences"]["minilm"]).parents[1] / "model"))
    )
    before = encoder.model.state_dict()
    for name, value in fitted.model.state_dict().items():
        assert value.equal(before[name]) == (not name.startswith("classifier.")), name
    rows = rows_of(paths["sentences"]["sentences"])
    inputs = fitted.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = fitted.model(**inputs).logits.argmax(dim=1)
    right = sum(LABELS[int(label)] == row["label"] for label, row in zip(found, rows, strict=True))
    assert right > 0.6 * len(rows)


def test_the_replies_of_the_speakers_with_most(paths: dict[str, dict[str, str]]) -> None:
    rows = rows_of(paths["dialogue"]["dialogue-2"])
    assert Counter(row["speaker"] for row in rows) == {"s0": 20, "s1": 20}
    assert {row["speaker"] for row in rows_of(paths["dialogue"]["new-0"])} == {"s2"}
    assert [row["response"].split()[-1] for row in rows[:4]] == ["3", "6", "9", "12"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tar\.gz: not found; `make study` fetches it"):
        prepare_sentences(tmp_path / "none.tar.gz", tmp_path)
    with pytest.raises(InputError, match="not found; `make study` fetches it"):
        prepare_dialogue(tmp_path, [2], source=str(tmp_path / "none.json"))
    archive, talk = write_archive(tmp_path / "h.tar.gz"), write_dialogue(tmp_path / "dataset.json")
    with pytest.raises(DataError, match="are too few"):
        prepare_sentences(archive, tmp_path, Sentences(most_words=5))
    with pytest.raises(DataError, match="fewer than 4 speakers with 50 replies"):
        prepare_dialogue(tmp_path, [2], source=str(talk))


def tiny_runs() -> list[Planned]:
    """A sweep, the cross with fewer clients for one seed, one rate that is far too large, a method, a dialogue."""
    runs = plan()
    sweep = [run for run in runs if run.part == "sweep" and run.task == "sentences"][:2]
    cross = [
        replace(run, num_clients={2: 2, 10: 3}[run.num_clients], rank=run.rank // 8)
        for run in runs
        if run.part == "kept"
        and run.seed == 0
        and run.rule.label in ("sfed", "lora")
        and (run.rank, run.num_clients) in ((128, 10), (32, 10), (128, 2))
    ]
    wild = replace(next(run for run in runs if run.part == "grid"), rate=1e31, num_clients=3, rank=4)
    method = replace(next(run for run in runs if run.part == "methods"), num_clients=3, rank=4)
    talk = [
        next(run for run in runs if run.part == "sweep" and run.task == "dialogue"),
        replace(next(run for run in runs if run.part == "dialogue"), num_clients=2, rank=4),
    ]
    return [*sweep, *cross, wild, method, *talk]


def tiny_sizes() -> dict[str, Any]:
    return {name: replace(size, num_rounds=2, local_steps=1, batch_size=4) for name, size in SIZES.items()}


def test_runs_become_lines_figures_and_a_page(paths: dict[str, dict[str, str]], tmp_path: Path) -> None:
    runs, sizes, results = tiny_runs(), tiny_sizes(), tmp_path / "results"
    done = []
    for run in run_study(runs[:4], sizes, paths, results, tmp_path / "work"):
        done.append(run.name)
        if len(done) == 4:  # stopped as a run begins
            break
    assert [run.name for run in run_study(runs, sizes, paths, results, tmp_path / "work")] == [
        run.name for run in runs[3:]
    ]
    assert list(run_study(runs, sizes, paths, results, tmp_path / "work")) == []
    assert not (tmp_path / "work" / "run").exists()

    study = read_study(results)
    assert sorted(line["run"] for line in study) == sorted(run.name for run in runs)
    [joined] = [line for line in study if "new_clients" in line]
    assert set(joined["new_clients"]) == {"editorials", "movies", "products", "tweets"}
    assert set(joined["new_clients"]["movies"]) == {
        "untouched",
        "local-only",
        "personalized",
        "personalized, A trained",
    }
    kept = [line for line in study if line["part"] == "kept"]
    assert {line["settings"]["local.learning_rate"] for line in kept} == {best_rate(study, "sentences")}
    for line in kept:
        rank, clients = line["settings"]["lora.rank"], line["settings"]["partition.num_clients"]
        expected = 8 * math.sqrt(8 / 2) * math.sqrt(clients / rank) if line["rule"] == "sfed" else 8 * 8 / rank
        assert line["gamma"] == pytest.approx(expected)
        assert [record["round_num"] for record in line["rounds"]] == [1, 2]
        assert line["rounds"][1]["grad_norm_b"] > 0
        assert len(line["client_test_losses"]) == clients
        assert loss_change(line) is not None
    [wild] = [line for line in study if line["part"] == "grid"]
    assert wild["failed"]
    assert "NaN or infinite" in wild["failed"]
    assert diverged(wild)
    assert loss_change(wild) is None

    drawn = draw_study(study, tmp_path / "figures")
    assert {path.stem for path in drawn} == set(FIGURES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    page = study_page(PAGE.read_text(encoding="utf-8"), study)
    assert "{{" not in page
    assert "diverged" in page


def test_lines_and_slopes_by_hand() -> None:
    def run(rank: int, clients: int, seed: int, norm: float) -> dict[str, Any]:
        settings = {"lora.rank": rank, "partition.num_clients": clients, "seed": seed}
        return {"rule": "lora", "settings": settings, "norm": norm}

    runs = [run(4, 10, 0, 8.0), run(4, 10, 1, 8.0), run(16, 10, 0, 3.0), run(16, 10, 1, 5.0), run(16, 5, 0, 9.0)]
    line = line_over(runs, "lora", 0, lambda found: float(found["norm"]))
    assert line.points == ((4.0, 8.0, 8.0, 8.0), (16.0, 4.0, 3.0, 5.0))
    assert slope(line) == pytest.approx(-0.5)
    assert line_over(runs, "lora", 1, lambda found: float(found["norm"])).points == (
        (5.0, 9.0, 9.0, 9.0),
        (10.0, 4.0, 3.0, 5.0),
    )
    assert slope(line_over(runs[:2], "lora", 0, lambda found: float(found["norm"]))) is None


def test_a_seed_that_is_not_whole_is_left_out() -> None:
    def run(rule: str, seed: int, part: str = "kept") -> dict[str, Any]:
        settings = {"lora.rank": 4, "partition.num_clients": 2, "seed": seed}
        return {"part": part, "rule": rule, "settings": settings}

    whole = [run("sfed", 0), run("lora", 0), run("sfed", 1), run("lora", 1), run("sfed", 0, "grid")]
    assert comparable([*whole, run("sfed", 2)]) == whole


def test_the_plan_has_what_the_study_promises() -> None:
    runs = plan()
    assert len({(run.part, run.name) for run in runs}) == len(runs)
    kept = Counter((run.rule.label, run.rank, run.num_clients) for run in runs if run.part == "kept")
    points = [(4, 10), (32, 10), (128, 10), (512, 10), (128, 2), (128, 5), (128, 20)]
    assert sorted(CROSS) == sorted(points)
    assert kept == {(rule.label, *point): 3 for rule in RULES for point in points}
    grid = Counter((run.rule.label, run.rank, run.num_clients) for run in runs if run.part == "grid")
    assert grid == {(rule.label, *point): 3 for rule in RULES for point in GRID_POINTS}  # the fourth is in `kept`
    first = {run.task: at for at, run in reversed([*enumerate(runs)])}
    for at, run in enumerate(runs):
        if run.part == "sweep":
            assert all(other.part == "sweep" for other in runs[first[run.task] : at])
    places: dict[str, str] = {f"dialogue-{count}": "x.jsonl" for count in (2, 8)}
    places |= {"minilm": "m", "sentences": "x.jsonl"}
    for run in runs:
        config = config_of(run, SIZES[run.task], places, 0.02, "run")
        assert config.local.optimizer == "sgd"
        assert config.local.learning_rate_a_ratio == (1 / run.num_clients if run.part == "slower_a" else 1)
        assert estimate_seconds(run, SIZES[run.task]) > 0


def test_all_rules_have_one_gamma_at_the_matching_point() -> None:
    gammas = {
        "sfed": lambda alpha: alpha * math.sqrt(2 / 8),
        "rslora": lambda alpha: alpha / math.sqrt(8),
        "lora": lambda alpha: alpha / 8,
    }
    for rule in RULES:
        assert gammas[rule.scaling](alpha_of(rule, 8.0)) == pytest.approx(8.0)


def test_the_published_page_is_what_the_raw_data_say() -> None:
    study = read_study(RESULTS)
    assert study
    page = study_page(PAGE.read_text(encoding="utf-8"), study)
    assert page == (DOCS / "study.md").read_text(encoding="utf-8"), "run make study-figures"
    for name in FIGURES:
        assert f"(study/{name}.png)" in page
        assert (DOCS / "study" / f"{name}.png").is_file()


def test_the_raw_data_are_small_and_name_no_folder() -> None:
    files = [*RESULTS.iterdir()]
    assert sum(file.stat().st_size for file in files) < 2e6
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "/tmp" not in text  # noqa: S108 - looked for, not used
        assert "/home" not in text
