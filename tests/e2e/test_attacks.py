"""Two of ten clients are hostile: the plain mean loses, a robust rule does not.

    SFEDLORA_TEST_DATA=.data pytest -m slow tests/e2e/test_attacks.py -s     # MiniLM on sentiment sentences, by hand

prints the table of docs/privacy.md.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfedlora import RunConfig
from sfedlora.data.corpora import hutto_rows, write_jsonl
from support.attacks import Attack, honest_accuracy
from support.real_files import MINILM, hutto_archive, require_minilm
from support.sentiment import DEGREES, SUBJECTS, WORDS, write_sentiment

HOSTILE = ("2", "5")
RULES = [("fedit", "krum"), ("sfed-lora", "trimmed_mean")]


def overrides(robust: str) -> list[str]:
    attackers = ["robust_attackers=2"] if robust != "none" else []
    return [f"robust={robust}", *attackers, *(["robust_taken=8"] if robust == "krum" else [])]


@pytest.fixture(scope="module")
def small_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clients with 34 training sentences each, of sixty words, and a random BERT."""
    folder = tmp_path_factory.mktemp("attacks")
    path = write_sentiment(folder, rounds={"num_rounds": 6, "weighting": "uniform"})
    rows = [
        {"text": f"{subject} {degree} {word}", "label": label}
        for subjects in SUBJECTS.values()
        for subject, degree in itertools.product(subjects, DEGREES)
        for label, words in WORDS.items()
        for word in words
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("preset", "robust"), RULES)
def test_a_hundredfold_opposite_update(preset: str, robust: str, small_task: Path) -> None:
    common = [f"preset={preset}", "partition.num_clients=10", "data.split=[0.6, 0.1, 0.3]"]
    attack = Attack(HOSTILE, -100.0)

    def accuracy(rule: str, chosen: Attack | None) -> float:
        return honest_accuracy(RunConfig.load(small_task, [*common, *overrides(rule)]), chosen, HOSTILE)

    clean, mean, robust_mean = accuracy("none", None), accuracy("none", attack), accuracy(robust, attack)
    assert mean < clean - 0.1
    assert robust_mean > mean + 0.08


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four thousand of the real sentences, drawn by a seed."""
    require_minilm()
    rows = hutto_rows(hutto_archive())
    chosen = np.random.default_rng(0).permutation(len(rows))[:4000]
    path = tmp_path_factory.mktemp("hutto") / "rows.jsonl"
    write_jsonl([rows[at] for at in chosen], path)
    return path


def minilm(sentences: Path, preset: str, robust: str) -> RunConfig:
    values: dict[str, Any] = {
        "preset": preset,
        "model": {"source": MINILM, "task": "sequence-classification"},
        "data": {"source": str(sentences), "max_length": 48, "split": [0.55, 0.05, 0.4]},
        "partition": {"scheme": "iid", "num_clients": 10},
        "lora": {"rank": 8},
        "rounds": {"num_rounds": 5, "weighting": "uniform"},
        "local": {"learning_rate": 2e-3, "local_steps": 5, "batch_size": 16},
        "robust": robust,
        "robust_attackers": None if robust == "none" else 2,
        "robust_taken": 8 if robust == "krum" else None,
        "threads": 1,
    }
    return RunConfig.from_mapping(values)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "robust"), RULES)
def test_a_tenfold_opposite_update_on_minilm(preset: str, robust: str, sentences: Path) -> None:
    attack = Attack(HOSTILE, -10.0)
    clean = honest_accuracy(minilm(sentences, preset, "none"), None, HOSTILE)
    mean = honest_accuracy(minilm(sentences, preset, "none"), attack, HOSTILE)
    kept = honest_accuracy(minilm(sentences, preset, robust), attack, HOSTILE)
    print(f"\n{preset}: clean {clean:.4f}, mean under attack {mean:.4f}, {robust} under attack {kept:.4f}")
    assert mean <= clean - 0.10
    assert kept >= clean - 0.02
