from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sfedlora.data.directories import safe_directory_name


@pytest.mark.parametrize("client_id", ["0", "17", "ai", "tech_support", "coding-1", "_x", "a" * 64])
def test_safe_ids_stay(client_id: str) -> None:
    assert safe_directory_name(client_id) == client_id


@pytest.mark.parametrize(
    "client_id", ["", ".", "..", "a/b", "a\\b", "A", "con", "lpt1", "-rf", "a b", "ä", "a" * 65, "x.y", "\0"]
)
def test_others_get_a_digest(client_id: str) -> None:
    digest = hashlib.sha256(client_id.encode()).hexdigest()[:32]
    assert re.fullmatch(r"[a-z0-9_][a-z0-9_-]{0,39}~" + digest, safe_directory_name(client_id))


@given(st.sets(st.text(alphabet="aA~0._-/ äÄ", max_size=5) | st.text(), min_size=2, max_size=20))
@example({"a", "A", "a~", "."})
@example({"\ud800"})
def test_names_are_safe_and_distinct_ignoring_case(client_ids: set[str]) -> None:
    names = [safe_directory_name(client_id) for client_id in client_ids]
    assert len({name.casefold() for name in names}) == len(client_ids)
    for name in names:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9_~-]{0,72}", name)


def test_a_name_is_no_safe_id() -> None:
    name = safe_directory_name("A/B")
    assert safe_directory_name(name) != name
