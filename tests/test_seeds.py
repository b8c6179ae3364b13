"""Seeds come from their address alone; the numbers are fixed for good, or no old run could be resumed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sfedlora.seeds import derive_seed, numpy_generator, torch_generator

address = st.lists(st.integers() | st.text(), max_size=4)


@given(st.integers(min_value=0), address, address)
def test_other_addresses_give_other_seeds(root: int, one: list[str | int], other: list[str | int]) -> None:
    typed = [[(type(part), part) for part in parts] for parts in (one, other)]
    assert (derive_seed(root, *one) == derive_seed(root, *other)) is (typed[0] == typed[1])
    assert 0 <= derive_seed(root, *one) < 2**63


def test_the_numbers_never_change() -> None:
    """blake2b of `i1:0s6:clients1:3i1:2`, 8 bytes, big endian, halved; computed by `b2sum -l 64` outside Python."""
    assert derive_seed(0, "client", "3", 2) == int("3553994afb4bfc77", 16) >> 1


def test_parts_do_not_run_together() -> None:
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")
    assert derive_seed(0, "1") != derive_seed(0, 1)
    assert derive_seed(1, "a") != derive_seed(0, "a")


def test_generators_repeat_their_draws_and_touch_no_global_state() -> None:
    state = torch.get_rng_state()
    first, second = (torch.randn(4, generator=torch_generator(0, "a", 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert numpy_generator(0, "a").random() == numpy_generator(0, "a").random()
    assert numpy_generator(0, "a").random() != numpy_generator(0, "b").random()
    assert torch.equal(torch.get_rng_state(), state)
