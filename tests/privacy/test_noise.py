"""The noise is normal, independent between draws, and comes out of its key alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from scipy import stats

from sfedlora.privacy import noise
from sfedlora.privacy.noise import derive_key, normal, random_key

KEY = bytes(range(32))
SIZE = 1 << 20


def test_values_are_standard_normal() -> None:
    values = normal(KEY, SIZE)
    # Kolmogorov and Smirnov: the largest distance to the normal law, 1.95 / sqrt(n) at a level of 0.1 %.
    assert float(stats.kstest(values, "norm").statistic) < 1.95 / math.sqrt(SIZE)
    assert abs(float(values.mean())) < 4 / math.sqrt(SIZE)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / SIZE)
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96 / SIZE)
    assert 4.5 < float(np.abs(values).max()) < 6.5
    for lag in (1, 2, noise.BLOCK_VALUES // 2, noise.BLOCK_VALUES):
        assert abs(float(np.corrcoef(values[:-lag], values[lag:])[0, 1])) < 4.5 / math.sqrt(SIZE - lag)


def test_the_stream_is_shake_256_of_key_and_block() -> None:
    """The Box-Muller transform, written out value by value."""
    words = hashlib.shake_256(KEY + bytes(8)).digest(16 * 3)
    uniform = [(int.from_bytes(words[at : at + 8], "little") >> 11) / 2**53 for at in range(0, 48, 8)]
    radius = [math.sqrt(-2 * math.log(1 - value)) for value in uniform[:3]]
    expected = [r * math.cos(2 * math.pi * u) for r, u in zip(radius, uniform[3:], strict=True)]
    expected += [r * math.sin(2 * math.pi * u) for r, u in zip(radius, uniform[3:], strict=True)]
    np.testing.assert_allclose(normal(KEY, 5), expected[:5], rtol=1e-12)


def test_equal_keys_give_equal_values_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "BLOCK_VALUES", 8)
    assert normal(KEY, 100).tolist() == normal(KEY, 100).tolist()
    assert len({*normal(KEY, 100).tolist(), *normal(derive_key(KEY, 1), 100).tolist()}) == 200


def test_addresses_are_told_apart() -> None:
    keys = [derive_key(KEY, *address) for address in ((1,), ("1",), (b"1",), ("1", ""), ("", "1"), (11,), (1, 1), ())]
    assert len({*keys}) == len(keys)
    assert {len(key) for key in keys} == {32}


def test_random_keys_differ() -> None:
    assert len({random_key() for _ in range(100)}) == 100
