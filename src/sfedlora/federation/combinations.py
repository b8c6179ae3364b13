"""Which privacy and which robust rule go with which method and settings; all others are refused.

The configuration asks here, and the table of docs/privacy.md is made of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from sfedlora.methods import Method
from sfedlora.methods.base import Weighting
from sfedlora.types import Part

__all__ = ["Protection", "why_refused"]

ROUNDS = (1, 2)
"""Methods may alternate between factors; these rounds show all of them."""


@dataclass(frozen=True)
class Protection:
    """What protects the rounds of a run; values as in the configuration.

    Attributes:
        method: the federated method.
        robust: none, median, trimmed_mean or krum.
        privacy: none, central or local.
        weighting: of clients in averages.
        init: of A.
        several_ranks: whether clients have ranks of their own.
        attackers: how many the robust rule withstands; None if not given.
        taken: how many updates Krum takes; None for one.
        cohort_size: updates of a round; None if not known yet.
        secure_sum: whether the server sees the sum of the updates alone.
    """

    method: Method
    robust: str = "none"
    privacy: str = "none"
    weighting: Weighting = "uniform"
    init: str = "shared"
    several_ranks: bool = False
    attackers: int | None = None
    taken: int | None = None
    cohort_size: int | None = None
    secure_sum: bool = False


def why_refused(protection: Protection) -> str | None:
    """What is against a combination and what to use instead, beginning with the key; None if it is allowed."""
    checks = (_against_robust, _against_attackers, _against_privacy, _against_secure_sum)
    return next(chain.from_iterable(check(protection) for check in checks), None)


def _against_robust(asked: Protection) -> Iterator[str]:
    if asked.robust == "none":
        return
    rule, name, traits = f"robust: {asked.robust}", asked.method.name, asked.method.traits
    if not _sends(asked.method):
        yield f"{rule} chooses among the updates of clients, which method {name!r} does not send; use none"
    if asked.robust != "krum" and not traits.is_mean:
        yield (
            f"{rule} takes the place of a mean of factors, but the server step of method {name!r} is another one; "
            "use krum or none"
        )
    if asked.robust != "krum" and any({Part.A, Part.B} <= asked.method.shared_parts(number) for number in ROUNDS):
        yield (
            f"{rule} is for methods that share one factor in a round, but {name!r} shares A and B, whose robust means "
            "multiply to something that no client need have sent; use krum"
        )
    if asked.several_ranks:
        yield f"{rule} compares updates entry by entry or as wholes and needs one rank for all clients; give one"
    if asked.init == "local":
        yield (
            f"{rule} compares changes of one broadcast A, but with lora.init: local every client begins with its own; "
            "use independent or shared"
        )
    if asked.privacy == "central":
        yield (
            f"{rule} cannot go with privacy.mode: central, whose noise is measured by what one client can change of a "
            "mean; use privacy.mode: local, or robust: none"
        )


def _against_attackers(asked: Protection) -> Iterator[str]:
    """The number of attackers is given where the rule has one, and the cohort is large enough for it."""
    if asked.taken is not None and asked.robust != "krum":
        yield f"robust_taken: {asked.taken} is used by robust: krum alone, got {asked.robust}; leave it out or null"
    if asked.robust in ("none", "median"):
        if asked.attackers is not None:
            yield f"robust_attackers: {asked.attackers} is not used by robust: {asked.robust}; leave it out or null"
        return
    if asked.attackers is None:
        yield f"robust: {asked.robust} needs robust_attackers, the number of hostile clients in a round to withstand"
        return
    needed = 2 * asked.attackers + (1 if asked.robust == "trimmed_mean" else 3)
    if asked.cohort_size is not None and asked.cohort_size < needed:
        yield (
            f"robust: {asked.robust} against robust_attackers: {asked.attackers} needs at least {needed} clients in a "
            f"round, got {asked.cohort_size}; raise rounds.cohort_size or lower robust_attackers"
        )
    if asked.taken is not None and asked.cohort_size is not None and asked.taken + asked.attackers > asked.cohort_size:
        yield (
            f"robust_taken: {asked.taken} of {asked.cohort_size} clients takes hostile ones, with robust_attackers: "
            f"{asked.attackers}; give at most {asked.cohort_size - asked.attackers}"
        )


def _against_privacy(asked: Protection) -> Iterator[str]:
    if asked.privacy == "none":
        return
    mode, name = f"privacy.mode: {asked.privacy}", asked.method.name
    if not _sends(asked.method):
        yield f"{mode} protects what a client sends, and method {name!r} sends nothing; use none"
    if asked.weighting != "uniform":
        yield (
            f"{mode} needs rounds.weighting: uniform, since a weight by examples lets one client change more than the "
            f"others and tells its number of examples; got {asked.weighting}"
        )
    if asked.privacy == "local":
        return
    if not asked.method.traits.is_mean:
        yield (
            f"{mode} adds noise to a mean of factors, but the server step of method {name!r} is another one; use "
            "privacy.mode: local, or a method whose server step is a mean"
        )
    if asked.several_ranks:
        yield f"{mode} divides by the planned cohort and needs one rank for all clients; give one number in lora.rank"
    if asked.init == "local":
        yield (
            f"{mode} clips changes of one broadcast A, but with lora.init: local every client begins with its own; use "
            "independent or shared"
        )


def _against_secure_sum(asked: Protection) -> Iterator[str]:
    if not asked.secure_sum:
        return
    key, name = "flower.secure_sum: true", asked.method.name
    if not _sends(asked.method):
        yield f"{key} hides what clients send, and method {name!r} sends nothing; leave it out"
    if not asked.method.traits.is_mean:
        yield (
            f"{key} shows no single update, which the server step of method {name!r} needs; use a method whose server "
            "step is a mean"
        )
    if asked.robust != "none":
        yield f"{key} shows no single update, which robust: {asked.robust} needs; use one of them"
    if asked.privacy == "central":
        yield f"{key} shows no single update to clip, as privacy.mode: central does; use privacy.mode: local"
    if asked.several_ranks:
        yield f"{key} adds updates of one length and needs one rank for all clients; give one number in lora.rank"


def _sends(method: Method) -> bool:
    return not method.traits.pools_data and any(method.shared_parts(number) for number in ROUNDS)
