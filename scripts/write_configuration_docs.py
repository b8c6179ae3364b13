"""Write docs/configuration.md from the schema: key, type, default and meaning of every key of a run's YAML file.

    python scripts/write_configuration_docs.py

The meanings are the docstrings in `sfedlora.config`; change them there. A test tells when the page is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfedlora.config import PRESETS, RunConfig

__all__ = ["configuration_page"]

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

<!-- Written by scripts/write_configuration_docs.py from the docstrings in src/sfedlora/config. -->

A run is described by one YAML file; `key=value` on the command line overrides it (`lora.rank=32`). Files are read as
YAML 1.2, so `1e-3` is a number. Unknown keys are refused, and so are counts above 1e6 and numbers above 1e30. The
smallest file names a model, a data source and a partition:

```yaml
model: {source: package:sfedlora/assets/tiny_llama}
data: {source: package:sfedlora/assets/tiny_chat.jsonl}
partition: {scheme: column, column: topic}
```
"""
HEADER = "| key | type | default | meaning |\n|---|---|---|---|\n"
PRESET_HEADER = "| preset | method.name | lora.scaling | lora.init |\n|---|---|---|---|\n"
TYPES = {"string": "text", "boolean": "true, false", "object": "mapping", "null": "null"}
TOP_LIMITS = (1e6, 1e30)
"""Of all counts and numbers; the introduction tells."""
LIMITS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


def configuration_page() -> str:
    """The whole page, Markdown."""
    schema = RunConfig.model_json_schema()
    sections = {key: _resolved(field, schema) for key, field in schema["properties"].items() if _is_section(field)}
    top = {key: field for key, field in schema["properties"].items() if key not in sections}
    parts = [INTRODUCTION, "## Top level\n", _table(top, schema.get("required", []), "")]
    for key, section in sections.items():
        title = f"## {key}\n\n{section['description']}\n"
        parts += [title, _table(section["properties"], section.get("required", []), f"{key}.")]
    rows = [
        f"| `{name}` | {values['method']['name']} | {values['lora']['scaling']} | {values['lora']['init']} |"
        for name, values in PRESETS.items()
    ]
    parts += ["## Presets\n\nWhat a `preset` sets; keys that the file gives win.\n", PRESET_HEADER + "\n".join(rows)]
    return "\n".join(parts) + "\n"


def _is_section(field: Mapping[str, Any]) -> bool:
    return "$ref" in field


def _resolved(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return found


def _table(fields: Mapping[str, Mapping[str, Any]], required: list[str], prefix: str) -> str:
    rows = []
    for key, field in fields.items():
        value = field.get("default", {})  # the schema omits an empty mapping, which a factory makes
        default = "**required**" if key in required else f"`{json.dumps(value, ensure_ascii=False)}`"
        cells = (f"`{prefix}{key}`", _type(field), default, field["description"])
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return HEADER + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(field: Mapping[str, Any]) -> str:
    """What may stand there, in words."""
    choices = field.get("anyOf") or field.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    if "const" in field or "enum" in field:
        return ", ".join(json.dumps(value).strip('"') for value in field.get("enum", [field.get("const")]))
    kind = str(field["type"])
    if kind == "array":
        items = field.get("prefixItems") or [field["items"]]
        count = f"{len(items)} of " if "prefixItems" in field else ""
        return f"list of {count}{_type(items[0]).replace(' or ', ' and ')}"
    found = [(sign, field[name]) for name, sign in LIMITS if field.get(name, TOP_LIMITS[0]) not in TOP_LIMITS]
    limits = " and ".join(f"{sign} {value:g}" for sign, value in found)
    return f"{TYPES.get(kind, kind)} {limits}".strip()


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
