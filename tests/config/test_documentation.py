from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel

from sfedlora import RunConfig
from support.scripts import load_script

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        found += keys(inner, f"{prefix}{name}.") if is_section else [prefix + name]  # type: ignore[arg-type]
    return found


def test_the_page_is_what_the_script_writes() -> None:
    script = load_script("write_configuration_docs")
    assert script.configuration_page() == PAGE, "run python scripts/write_configuration_docs.py"


def test_every_key_has_a_row_with_a_meaning() -> None:
    rows = dict(line.strip("| ").split(" | ", 1) for line in PAGE.splitlines() if line.startswith("| `"))
    for key in keys(RunConfig):
        kind, default, meaning = rows[f"`{key}`"].split(" | ")
        assert kind
        assert default
        assert len(meaning) > 10, key


def test_the_smallest_file_is_a_configuration() -> None:
    example = PAGE.split("```yaml\n")[1].split("```")[0]
    assert RunConfig.from_mapping(yaml.safe_load(example)).partition.column == "topic"
