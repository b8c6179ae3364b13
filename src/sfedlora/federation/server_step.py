"""What the server does with the replies of a round: refuse, aggregate, step.

The same for a simulation and for a server across sites, which has no base model: `ServerRules` is all that it needs.

Under local privacy the clients send what `privatized` made; under central privacy they send what they have, and the
noise is added here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfedlora.errors import RunError, UpdateError
from sfedlora.federation.robust import RobustRule, krum, robust_mean
from sfedlora.federation.server_optimizer import ServerOptimizer, apply_server_optimizer
from sfedlora.methods import Method, aggregate, check_update, check_updates
from sfedlora.methods.base import Weighting
from sfedlora.privacy.mechanism import Privacy, noise_key, noised_mean, with_noise_key
from sfedlora.types import LoraSizes, ServerState, Tensors, Update, select_parts

__all__ = ["ServerRules", "accept_updates", "server_step", "server_step_by_change", "server_step_with_record"]


@dataclass(frozen=True)
class ServerRules:
    """What turns a server's state and the updates of a round into its next state; constants of a run.

    Attributes:
        method: the federated method.
        sizes: rank and gamma of the shared factors and of every client's.
        weighting: weight of a client in every average.
        server_optimizer: a step along the change of the shared factors; None takes the method's result as it is.
        robust: a rule that takes the place of the mean; None for the mean.
        privacy: differential privacy of the clients; None for none.
    """

    method: Method
    sizes: LoraSizes
    weighting: Weighting
    server_optimizer: ServerOptimizer | None = None
    robust: RobustRule | None = None
    privacy: Privacy | None = None


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
    rules: ServerRules, state: ServerState, updates: Sequence[Update], excluded: Mapping[str, str]
) -> ServerState:
    """The state after a round.

    Args:
        rules: constants of the run.
        state: the state before the round; not changed.
        updates: accepted updates, in any order.
        excluded: why the other clients of the cohort are not among them, for the message where none is.

    Raises:
        RunError: there is no update, or fewer than the robust rule needs.
    """
    return server_step_with_record(rules, state, updates, excluded)[0]


def server_step_with_record(
    rules: ServerRules, state: ServerState, updates: Sequence[Update], excluded: Mapping[str, str]
) -> tuple[ServerState, dict[str, Any]]:
    """`server_step`, and what the round's line of metrics.jsonl says of it.

    Returns:
        The state, and `robust_selected` (the clients that Krum chose) or `clip_fraction` (central privacy: the share of
        clients whose change was clipped), where they apply.
    """
    round_num = state.round_num + 1
    if not updates:
        reasons = "; ".join(f"{client_id}: {reason}" for client_id, reason in sorted(excluded.items()))
        raise RunError(f"round {round_num}: every client of the cohort failed ({reasons})")
    state = with_noise_key(rules.privacy, state)
    after, record = _aggregated(rules, state, updates)
    return _optimized(rules, state, after), record


def server_step_by_change(rules: ServerRules, state: ServerState, change: Tensors) -> ServerState:
    """The state after a round of which only the weighted sum of the clients' changes is known.

    Args:
        rules: constants of the run, of a method whose server step is a mean.
        state: the state before the round; not changed.
        change: sum_k p_k (X_k - X) of every factor X that the round shares, in float64.
    """
    factors = {name: (state.shared[name].double() + one).to(state.shared[name].dtype) for name, one in change.items()}
    return _optimized(rules, state, _moved(state, factors))


def _optimized(rules: ServerRules, state: ServerState, after: ServerState) -> ServerState:
    """A step of the server optimizer along the change, where there is one."""
    if rules.server_optimizer is None:
        return after
    return apply_server_optimizer(rules.server_optimizer, state, after, rules.method.shared_parts(after.round_num))


def _aggregated(
    rules: ServerRules, state: ServerState, updates: Sequence[Update]
) -> tuple[ServerState, dict[str, Any]]:
    """The method's server step, or the robust or the private one in its place."""
    method, robust, privacy = rules.method, rules.robust, rules.privacy
    before = select_parts(state.shared, method.shared_parts(state.round_num + 1))
    if robust is not None and robust.name == "krum":
        check_updates(method, state, updates, rules.sizes)
        chosen = krum(robust, before, updates, rules.sizes)
        after = aggregate(method, state, chosen, weighting="uniform", sizes=rules.sizes)
        return after, {"robust_selected": [update.client_id for update in chosen]}
    if robust is not None:
        check_updates(method, state, updates, rules.sizes)
        return _moved(state, robust_mean(robust, before, updates)), {}
    if privacy is not None and privacy.mode == "central":
        check_updates(method, state, updates, rules.sizes)
        return _noised(privacy, state, before, updates)
    return aggregate(method, state, updates, weighting=rules.weighting, sizes=rules.sizes), {}


def _noised(
    privacy: Privacy, state: ServerState, before: Tensors, updates: Sequence[Update]
) -> tuple[ServerState, dict[str, Any]]:
    ordered = (update.tensors for update in sorted(updates, key=lambda update: update.client_id))
    key = noise_key(privacy, state)
    release = noised_mean(privacy, before, ordered, round_num=state.round_num + 1, key=key)
    return _moved(state, release.tensors), {"clip_fraction": privacy.clip_fraction(release.norms)}


def _moved(state: ServerState, factors: Tensors) -> ServerState:
    return replace(state, round_num=state.round_num + 1, shared={**state.shared, **factors})
