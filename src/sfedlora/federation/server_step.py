"""What the server does with the replies of a round: refuse, aggregate, step.

The same for a simulation and for a server across sites, which has no base model: `ServerRules` is all that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sfedlora.errors import RunError, UpdateError
from sfedlora.federation.server_optimizer import ServerOptimizer, apply_server_optimizer
from sfedlora.methods import Method, aggregate, check_update
from sfedlora.methods.base import Weighting
from sfedlora.types import LoraSizes, ServerState, Update

__all__ = ["ServerRules", "accept_updates", "server_step"]


@dataclass(frozen=True)
class ServerRules:
    """What turns a server's state and the updates of a round into its next state; constants of a run.

    Attributes:
        method: the federated method.
        sizes: rank and gamma of the shared factors and of every client's.
        weighting: weight of a client in every average.
        server_optimizer: a step along the change of the shared factors; None takes the method's result as it is.
    """

    method: Method
    sizes: LoraSizes
    weighting: Weighting
    server_optimizer: ServerOptimizer | None = None


def accept_updates(
    rules: ServerRules, state: ServerState, updates: Iterable[Update]
) -> tuple[list[Update], dict[str, str]]:
    """Tell the updates that the open round can use from the others.

    Returns:
        The usable ones, in the order given, and client id -> why an update is refused.
    """
    accepted: list[Update] = []
    refused: dict[str, str] = {}
    for update in updates:
        try:
            check_update(rules.method, state, update, rules.sizes)
        except UpdateError as error:
            refused[update.client_id] = error.reason
        else:
            accepted.append(update)
    return accepted, refused


def server_step(
    rules: ServerRules, state: ServerState, updates: Sequence[Update], excluded: dict[str, str]
) -> ServerState:
    """The state after a round.

    Args:
        rules: constants of the run.
        state: the state before the round; not changed.
        updates: accepted updates, in any order.
        excluded: why the other clients of the cohort are not among them, for the message where none is.

    Raises:
        RunError: there is no update.
    """
    round_num = state.round_num + 1
    if not updates:
        reasons = "; ".join(f"{client_id}: {reason}" for client_id, reason in sorted(excluded.items()))
        raise RunError(f"round {round_num}: every client of the cohort failed ({reasons})")
    after = aggregate(rules.method, state, updates, weighting=rules.weighting, sizes=rules.sizes)
    if rules.server_optimizer is None:
        return after
    return apply_server_optimizer(rules.server_optimizer, state, after, rules.method.shared_parts(round_num))
