"""Every file of the corpus through its parser, as a fuzzer would give it; needs no fuzzer.

Files that a fuzzer found and that once crashed are among them, under names that say what they are.
"""

from __future__ import annotations

import importlib
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in Path(__file__).parent.glob("fuzz_*.py"))
MAX_GROWTH_KB = 256 * 1024


def _fuzz_one(target: str) -> Callable[[bytes], None]:
    found: Callable[[bytes], None] = importlib.import_module(f"fuzz.fuzz_{target}").fuzz_one
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_gives_typed_errors_only_and_memory_stays_bounded(target: str) -> None:
    fuzz_one = _fuzz_one(target)
    files = sorted((CORPUS / target).iterdir())
    assert files
    fuzz_one(files[0].read_bytes())  # what is imported and kept at the first call is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in files:
        fuzz_one(path.read_bytes())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KB


@st.composite
def _mutated(draw: st.DrawFn, target: str) -> bytes:
    """A file of the corpus, cut, with bytes replaced, inserted or repeated."""
    content = bytearray(draw(st.sampled_from(sorted((CORPUS / target).iterdir()))).read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["replace", "insert", "cut", "repeat"])):
            case "replace":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
            case "insert":
                content[at:at] = draw(st.sampled_from([b"\0", b"{", b"[", b"-", b"1e999", b"9" * 40, b"\xff", b'"']))
            case "cut":
                del content[at:]
            case _:
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
    return bytes(content)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_near_the_corpus_gives_typed_errors_only(target: str) -> None:
    fuzz_one = _fuzz_one(target)

    @settings(max_examples=60, deadline=None, database=None)
    @given(data=_mutated(target))
    def check(data: bytes) -> None:
        fuzz_one(data)

    check()
