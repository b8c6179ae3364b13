"""The masks cancel to the bit, hide what they cover, and nothing else opens the sum."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sfedlora.errors import ConfigError, RunError
from sfedlora.privacy import secure_sum
from sfedlora.privacy.secure_sum import SecureSum, masked, new_private_key, opened, public_key_of, with_message

SITES = ("aachen", "berlin", "chemnitz", "dresden")
PRIVATE = {site: new_private_key() for site in SITES}
PUBLIC = {site: public_key_of(key) for site, key in PRIVATE.items()}
TOTAL = SecureSum("trial", 3, SITES, limit=2.0)


def send(site: str, values: NDArray[np.float32], total: SecureSum = TOTAL) -> NDArray[np.uint32]:
    return masked(total, site, values, private_key=PRIVATE[site], public_keys=PUBLIC)


def looks_random(message: NDArray[np.uint32]) -> bool:
    """Bytes and whole words are uniform, at a level of about 0.1 %."""
    counts = np.bincount(np.frombuffer(message.tobytes(), np.uint8), minlength=256)
    words = stats.kstest(message / 2.0**32, "uniform").statistic
    return bool(stats.chisquare(counts).pvalue > 1e-3 and words < 1.95 / np.sqrt(len(message)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), size=st.integers(1, 40), count=st.integers(3, 4), limit=st.sampled_from([1e-3, 2.0, 1e6])
)
def test_the_sum_is_that_of_the_rounded_values(seed: int, size: int, count: int, limit: float) -> None:
    total = SecureSum("trial", seed, SITES[:count], limit)
    values = np.random.default_rng(seed).uniform(-limit, limit, (count, size)).astype(np.float32)
    values[:, 0] = limit if seed % 2 else -limit  # all at the edge: no overflow
    values = np.clip(values, -np.float32(limit) * (1 - 1e-6), np.float32(limit) * (1 - 1e-6)).astype(np.float32)
    messages = [send(site, row, total) for site, row in zip(total.cohort, values, strict=True)]
    found = opened(total, reduce(with_message, messages, None), total.cohort)  # type: ignore[arg-type]
    step = count * limit / (2**31 - 1 - count)
    whole = [[round(float(value) / step) for value in row] for row in values.tolist()]
    np.testing.assert_allclose(found, [sum(column) * step for column in zip(*whole, strict=True)], rtol=1e-12)
    np.testing.assert_allclose(found, values.astype(float).sum(axis=0), atol=count * step)


def test_a_message_looks_random_whatever_it_says() -> None:
    zeros = np.zeros(200_000, np.float32)
    plain = np.zeros(200_000, np.uint32)
    assert not looks_random(plain)
    for site in SITES:
        assert looks_random(send(site, zeros))
    first, second = send("aachen", zeros), send("aachen", zeros, replace(TOTAL, round_num=4))
    assert looks_random(first - second)
    assert looks_random(first - send("aachen", zeros, replace(TOTAL, federation_id="other")))
    assert looks_random(first - send("aachen", zeros, replace(TOTAL, cohort=SITES[:3])))
    assert (first == send("aachen", zeros)).all()


def test_what_is_missing_or_comes_twice_leaves_noise_and_is_refused() -> None:
    zeros = np.zeros(100_000, np.float32)
    messages = {site: send(site, zeros) for site in SITES}
    three = reduce(with_message, [messages[site] for site in SITES[:3]], None)
    assert three is not None
    assert looks_random(three)
    for senders in (SITES[:3], (*SITES, "aachen"), (*SITES[:3], "aachen")):
        with pytest.raises(RunError, match="the round is void"):
            opened(TOTAL, three, senders)
    assert not opened(TOTAL, with_message(three, messages["dresden"]), SITES).any()


def test_a_site_that_tells_the_server_all_it_knows_uncovers_nobody() -> None:
    """It can take its own masks off the message of another site, which stays under those of the rest."""
    zeros = np.zeros(100_000, np.float32)
    own = X25519PrivateKey.from_private_bytes(PRIVATE["dresden"])
    shared = own.exchange(X25519PublicKey.from_public_bytes(PUBLIC["aachen"]))
    message = send("aachen", zeros)
    secure_sum._add_mask(message, secure_sum._mask_key(TOTAL, shared, "dresden", "aachen"), subtract=True)
    assert looks_random(message)


def test_a_key_that_the_server_puts_in_place_of_another_is_noticed_as_noise() -> None:
    zeros = np.zeros(100_000, np.float32)
    forged = {**PUBLIC, "berlin": public_key_of(new_private_key())}
    messages = [send(site, zeros) for site in SITES[1:]]
    messages.append(masked(TOTAL, "aachen", zeros, private_key=PRIVATE["aachen"], public_keys=forged))
    found = reduce(with_message, messages, None)
    assert found is not None
    assert looks_random(found)


@pytest.mark.parametrize("value", [2.1, -3.0, float("nan"), float("inf")])
def test_a_value_that_nobody_could_find_later_is_refused_at_the_site(value: float) -> None:
    with pytest.raises(RunError, match="beyond the limit of 2"):
        send("aachen", np.array([0.0, value], np.float32))


@pytest.mark.parametrize("cohort", [("aachen",), ("aachen", "berlin"), ("aachen", "berlin", "berlin")])
def test_too_small_a_cohort_is_refused(cohort: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        send("aachen", np.zeros(2, np.float32), replace(TOTAL, cohort=cohort))


def test_an_unknown_site_is_refused() -> None:
    with pytest.raises(ConfigError, match="no public key of essen"):
        send("aachen", np.zeros(2, np.float32), replace(TOTAL, cohort=(*SITES, "essen")))
    with pytest.raises(ConfigError, match="no public key of dresden"):
        masked(
            replace(TOTAL, cohort=SITES[:3]),
            "dresden",
            np.zeros(2, np.float32),
            private_key=PRIVATE["dresden"],
            public_keys=PUBLIC,
        )


def test_a_message_of_another_size_is_refused() -> None:
    first = send("aachen", np.zeros(2, np.float32))
    with pytest.raises(RunError, match="a message of"):
        with_message(first, np.zeros(3, np.uint32))
    with pytest.raises(RunError, match="a message of"):
        with_message(first, np.zeros(2, np.float32))
