"""Which privacy and which robust rule go with which method and settings; all others are refused.

The configuration asks here, and the table of docs/privacy.md is made of the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfedlora.methods import Method
from sfedlora.methods.base import Weighting
from sfedlora.types import Part

__all__ = ["Protection", "why_refused"]

NAMED_ROUNDS = (1, 2)
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
        cohort_size: updates of a round; None if not known yet.
    """

    method: Method
    robust: str = "none"
    privacy: str = "none"
    weighting: Weighting = "uniform"
    init: str = "shared"
    several_ranks: bool = False
    attackers: int | None = None
    cohort_size: int | None = None


def why_refused(protection: Protection) -> str | None:
    """What is against a combination and what to use instead, beginning with the key; None if it is allowed."""
    return _against_robust(protection) or _against_privacy(protection)


def _against_robust(asked: Protection) -> str | None:
    rule, name, traits = f"robust: {asked.robust}", asked.method.name, asked.method.traits
    if asked.robust == "none":
        return _against_attackers(asked)
    if traits.pools_data or not _shares(asked.method):
        return f"{rule} chooses among the updates of clients, which method {name!r} does not send; use none"
    if asked.robust != "krum" and not traits.is_mean:
        return (
            f"{rule} takes the place of a mean of factors, but the server step of method {name!r} is another one; "
            "use krum or none"
        )
    if asked.robust != "krum" and _shares_both_factors(asked.method):
        return (
            f"{rule} is for methods that share one factor in a round, but {name!r} shares A and B, whose robust means "
            "multiply to something that no client need have sent; use krum"
        )
    if asked.several_ranks:
        return f"{rule} compares updates entry by entry or as wholes and needs one rank for all clients; give one"
    if asked.init == "local":
        return (
            f"{rule} compares the changes of one broadcast A, but with lora.init: local every client begins with its "
            "own; use independent or shared"
        )
    if asked.privacy == "central":
        return (
            f"{rule} cannot go with privacy.mode: central, whose noise is measured by what one client can change of a "
            "mean; use privacy.mode: local, or robust: none"
        )
    return _against_attackers(asked)


def _against_attackers(asked: Protection) -> str | None:
    """The number of attackers is given where the rule has it, and the cohort is large enough for it."""
    attackers, cohort = asked.attackers, asked.cohort_size
    if asked.robust in ("none", "median"):
        if attackers is None:
            return None
        return f"robust_attackers: {attackers} is not used by robust: {asked.robust}; leave it out or null"
    if attackers is None:
        return f"robust: {asked.robust} needs robust_attackers, the number of hostile clients in a round to withstand"
    needed = 2 * attackers + (1 if asked.robust == "trimmed_mean" else 3)
    if cohort is not None and cohort < needed:
        return (
            f"robust: {asked.robust} against robust_attackers: {attackers} needs at least {needed} clients in a round, "
            f"got {cohort}; raise rounds.cohort_size or lower robust_attackers"
        )
    return None


def _against_privacy(asked: Protection) -> str | None:
    mode, name, traits = f"privacy.mode: {asked.privacy}", asked.method.name, asked.method.traits
    if asked.privacy == "none":
        return None
    if traits.pools_data or not _shares(asked.method):
        return f"{mode} protects what a client sends, and method {name!r} sends nothing; use none"
    if asked.weighting != "uniform":
        return (
            f"{mode} needs rounds.weighting: uniform, since a weight by examples lets one client change more than the "
            f"others and tells its number of examples; got {asked.weighting}"
        )
    if asked.privacy == "local":
        return None
    if not traits.is_mean:
        return (
            f"{mode} adds noise to a mean of factors, but the server step of method {name!r} is another one; use "
            "privacy.mode: local, or a method whose server step is a mean"
        )
    if asked.several_ranks:
        return f"{mode} divides by the planned cohort and needs one rank for all clients; give one number in lora.rank"
    if asked.init == "local":
        return (
            f"{mode} clips changes of one broadcast A, but with lora.init: local every client begins with its own; use "
            "independent or shared"
        )
    return None


def _shares(method: Method) -> bool:
    return any(method.shared_parts(number) for number in NAMED_ROUNDS)


def _shares_both_factors(method: Method) -> bool:
    return any({Part.A, Part.B} <= method.shared_parts(number) for number in NAMED_ROUNDS)
