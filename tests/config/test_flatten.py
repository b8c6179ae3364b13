from __future__ import annotations

from sfedlora.config.flatten import flatten


def test_sections_become_dotted_keys_and_columns_stay_whole() -> None:
    values = {"seed": 0, "data": {"source": "x", "columns": {"prompt": "q"}}, "lora": {"rank": 8}}
    assert flatten(values) == {"seed": 0, "data.source": "x", "data.columns": {"prompt": "q"}, "lora.rank": 8}
