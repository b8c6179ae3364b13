"""Every recipe: it validates, its commands exist, and its columns, template and partition work on rows of that form.

Hub ids and large models are replaced by the packaged tiny model and by small local files.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from sfedlora import RunConfig
from sfedlora.cli.app import app
from sfedlora.config.grid import Axis, make_cells, method_axis
from sfedlora.config.yaml_file import split_values
from sfedlora.setup import prepare

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
COLUMNS: dict[str, dict[str, list[Any]]] = {
    "tatsu-lab/alpaca": {"instruction": ["Name a colour."], "input": [""], "output": ["Red."], "text": ["..."]},
    "openai/gsm8k": {"question": ["What is 2 + 3?"], "answer": ["2 + 3 = 5\n#### 5"]},
    "nyu-mll/glue": {"premise": ["It rains."], "hypothesis": ["It is wet."], "label": [0, 1, 2], "idx": [1]},
    "gsm_symbolic.jsonl": {"question": ["Ann has 2 pens."], "answer": ["2"]},
    "chitchat.jsonl": {
        "prompt": ["hi"],
        "response": ["hello there"],
        "speaker": [f"s{at}" for at in range(8)],
        "conversation": list(range(97)),
    },
    "hutto.jsonl": {"text": ["good film"], "label": ["positive", "negative"], "domain": ["movies", "tweets"]},
}


def comments(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in comments(path).splitlines() if line.startswith("sfedlora ")]


def write_rows(source: str, folder: Path) -> Path:
    columns = COLUMNS[source]
    rows = [{name: values[at % len(values)] for name, values in columns.items()} for at in range(800)]
    if source == "hutto.jsonl":  # labels and domains that do not go together
        rows = [{**row, "domain": columns["domain"][at // 2 % 2]} for at, row in enumerate(rows)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_works_on_rows_of_its_form(path: Path, tmp_path: Path) -> None:
    config = RunConfig.load(path)
    source = str(write_rows(config.data.source, tmp_path))
    model = "package:sfedlora/assets/tiny_llama"
    replaced: dict[str, Any] = {
        "model.source": model,
        "data.source": source,
        "data.subset": None,
        "model.dtype": "float32",
    }
    replaced |= {"lora.rank": 4, "threads": 1, "output": str(tmp_path / "run"), "runner": "serial"}
    if config.data.template == "alpaca":
        replaced["data.max_length"] = 128
    prepared = prepare(config.with_values(replaced))
    planned = config.partition.num_clients
    assert len(prepared.federation.splits) == (planned if planned is not None else 2)
    assert int(prepared.federation.data.lengths.min()) > 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_commands_name_verbs_options_and_cells_that_exist(path: Path, tmp_path: Path) -> None:
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    assert commands(path), "a recipe has its command on top"
    for verb, first, *rest in commands(path):
        assert verb in verbs
        if verb not in ("run", "compare"):
            assert first == RunConfig.load(path).output
            continue
        assert first == f"recipes/{path.name}"
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        axes = [method_axis(split_values(options["--methods"]))] if "--methods" in options else []
        short = {"--ranks": "lora.rank", "--clients": "partition.num_clients"}
        axes += [Axis.of_key(key, split_values(options[name])) for name, key in short.items() if name in options]
        if "--vary" in options:
            key, _, values = options["--vary"].partition("=")
            axes.append(Axis.of_key(key, split_values(values)))
        assert set(options) <= {"--methods", "--ranks", "--clients", "--vary", "--output"}
        if axes:
            assert make_cells(path, [], axes, tmp_path)


def test_the_paper_s_letter_is_spelled_out() -> None:
    letter = RunConfig.load(next(path for path in RECIPES if path.stem == "alpaca-llama2-7b-letter"))
    assert (letter.lora.init, letter.lora.num_clients, letter.rounds.weighting) == ("local", "total", "uniform")
    assert re.search(r"r = 2048", comments(next(path for path in RECIPES if path.stem.startswith("rank-sweep"))))
