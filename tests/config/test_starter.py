"""The commented first file: every key has its place, and what is commented out is the default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sfedlora import RunConfig
from sfedlora.config.flatten import flatten
from sfedlora.config.starter import starter_yaml
from sfedlora.errors import ConfigError

CHOSEN: dict[str, Any] = {
    "model.source": "some/model",
    "data.source": "rows.jsonl",
    "partition.num_clients": 4,
    "lora.rank": 32,
}


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        found += keys(inner, f"{prefix}{name}.") if is_section else [prefix + name]  # type: ignore[arg-type]
    return found


def test_the_file_loads_with_what_was_chosen(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter_yaml(CHOSEN), encoding="utf-8")
    loaded = flatten(RunConfig.load(path).model_dump(mode="json"))
    nested: dict[str, Any] = {"model": {"source": "some/model"}, "data": {"source": "rows.jsonl"}}
    nested |= {"partition": {"num_clients": 4}, "lora": {"rank": 32}}
    assert loaded == flatten(RunConfig.from_mapping(nested).model_dump(mode="json"))


def test_every_key_is_there_once_with_its_meaning_and_uncommented_changes_nothing(tmp_path: Path) -> None:
    text = starter_yaml(CHOSEN)
    bare = re.sub(r"^( *)# (?=[a-z_0-9]+:)", r"\1", text, flags=re.MULTILINE)
    names = re.findall(r"^ *([a-z_0-9]+):", bare, flags=re.MULTILINE)
    sections = [name for name, field in RunConfig.model_fields.items() if _is_section(field.annotation)]
    assert sorted(names) == sorted([*(key.rsplit(".", 1)[-1] for key in keys(RunConfig)), *sections])
    path = tmp_path / "run.yaml"
    path.write_text(bare, encoding="utf-8")
    (tmp_path / "first.yaml").write_text(text, encoding="utf-8")
    assert RunConfig.load(path) == RunConfig.load(tmp_path / "first.yaml")
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if re.match(r" +(# )?[a-z_0-9]+:", line):
            assert lines[at - 1].lstrip().startswith("## "), line


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="model is required"):
        starter_yaml({"partition.num_clients": 4})


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
