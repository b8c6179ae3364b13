"""What a federation is (fixed for a run) and what it carries from round to round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfedlora.data.encoded import EncodedData
from sfedlora.data.partition import ClientSplit
from sfedlora.federation.evaluate import EvalBatching
from sfedlora.federation.initialize import SHARED_OWNER, Initialization, draw_a
from sfedlora.federation.objective import Task
from sfedlora.federation.robust import RobustRule
from sfedlora.federation.runners import Runner
from sfedlora.federation.schedule import Schedule
from sfedlora.federation.server_optimizer import ServerOptimizer
from sfedlora.federation.server_step import ServerRules
from sfedlora.lora.base_delta import select_deltas
from sfedlora.lora.inject import ResidentModel
from sfedlora.methods import Method, client_factors
from sfedlora.methods.base import Weighting
from sfedlora.privacy.examples import ExamplePrivacy
from sfedlora.privacy.mechanism import Privacy, with_noise_key
from sfedlora.types import LoraSizes, Part, ServerState, Tensors, select_parts

__all__ = [
    "Federation",
    "FederationState",
    "RoundSettings",
    "initial_state",
    "load_serving",
    "rules_of",
    "server_rules",
    "serves_one_model",
    "serving_adapter",
    "starting_adapter",
    "with_clients",
]

POOLED_ID = "centralized"
"""Client id of the one participant of a method that pools the data."""


@dataclass(frozen=True)
class RoundSettings:
    """How rounds are run; the configuration documents each field."""

    num_rounds: int
    cohort_size: int | None
    weighting: Weighting
    learning_rate: float
    schedule: Schedule
    warmup_rounds: int
    evaluate_every: int
    evaluated: Literal["all", "cohort"] | int
    server_optimizer: ServerOptimizer | None = None
    robust: RobustRule | None = None
    privacy: Privacy | None = None
    example_privacy: ExamplePrivacy | None = None
    most_uses: int = 0  # optimizer steps of a round that an example is in, of the client with the fewest examples


@dataclass(frozen=True)
class Federation:
    """Everything that stays the same during a run.

    Attributes:
        resident: the one base model with its adapter buffers.
        runner: executes a cohort.
        method: the federated method.
        data: all encoded examples.
        splits: client id -> its train, validation and test examples.
        participants: who trains: client id -> training examples. The clients, or one participant with all data.
        external: further example sets evaluated beside the clients' splits, by `validation` and `test`.
        initial: the complete adapter before round 1: A as formed, B zero, head as drawn or loaded.
        init: how A was initialised.
        sizes: rank and gamma of the shared factors and of every client's.
        effective_clients: the count that N stands for in this run.
        task, pad_token_id, batching, rounds, seed: as named.
    """

    resident: ResidentModel
    runner: Runner
    method: Method
    data: EncodedData
    splits: Mapping[str, ClientSplit]
    participants: Mapping[str, Sequence[int]]
    external: Mapping[str, EncodedData]
    initial: Tensors
    init: Initialization
    sizes: LoraSizes
    effective_clients: float
    task: Task
    pad_token_id: int
    batching: EvalBatching
    rounds: RoundSettings
    seed: int


@dataclass(frozen=True)
class FederationState:
    """What is carried from round to round.

    The mappings of clients may be plain dictionaries, or read a client's file whenever it is asked for: nothing here
    keeps what they return.

    Attributes:
        server: the server's state.
        personal: client id -> the factors that it keeps, for clients that took part.
        optimizer: client id -> optimizer moments, where they are kept.
    """

    server: ServerState
    personal: Mapping[str, Tensors]
    optimizer: Mapping[str, Tensors]


@dataclass(frozen=True, eq=False)
class _Overlay(Mapping[str, Tensors]):
    """Clients in memory over clients that are read when they are asked for."""

    in_memory: Mapping[str, Tensors]
    below: Mapping[str, Tensors]

    def __getitem__(self, client_id: str) -> Tensors:
        return self.in_memory[client_id] if client_id in self.in_memory else self.below[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self.below), **dict.fromkeys(self.in_memory)})

    def __len__(self) -> int:
        return len(self.below) + sum(client_id not in self.below for client_id in self.in_memory)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.in_memory or client_id in self.below


def with_clients(clients: Mapping[str, Tensors], changed: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
    """The mapping with some clients' tensors replaced; clients on disk are not read."""
    if isinstance(clients, dict):
        return {**clients, **changed}
    if isinstance(clients, _Overlay):
        return _Overlay({**clients.in_memory, **changed}, clients.below)
    return _Overlay(changed, clients)


def server_rules(federation: Federation) -> ServerRules:
    """What the server of a federation does with updates."""
    return rules_of(federation.method, federation.sizes, federation.rounds)


def rules_of(method: Method, sizes: LoraSizes, rounds: RoundSettings) -> ServerRules:
    """The rules that round settings ask for."""
    return ServerRules(
        method, sizes, rounds.weighting, rounds.server_optimizer, robust=rounds.robust, privacy=rounds.privacy
    )


def initial_state(federation: Federation) -> FederationState:
    """The state before round 1."""
    shared = select_parts(federation.initial, frozenset(Part) - federation.method.personal_parts())
    rounds = federation.rounds
    return FederationState(with_noise_key(rounds.privacy or rounds.example_privacy, ServerState(0, shared, {})), {}, {})


def serving_adapter(federation: Federation, state: FederationState, client_id: str) -> dict[str, Tensor]:
    """The complete adapter a client serves now: shared factors, and its own personal ones or the initial ones."""
    own = state.personal.get(client_id)
    if own is None and _keeps_own_a(federation):
        own = _own_draw(federation, client_id)
    common = {**federation.initial, **state.server.shared}
    return {**_of_size(federation, common, client_id), **(own or {})}


def starting_adapter(federation: Federation, state: FederationState, client_id: str) -> dict[str, Tensor]:
    """The complete adapter a client starts the next round from.

    That is what it serves, but with `init: local` round 1 starts from its own A, and a method that restarts begins
    every later round with a new draw of A and B = 0.
    """
    adapter = serving_adapter(federation, state, client_id)
    round_num = state.server.round_num + 1
    if federation.init == "local" and round_num == 1:
        return adapter | _own_draw(federation, client_id)
    if federation.method.traits.restarts and round_num > 1:
        zeros = {name: torch.zeros_like(b) for name, b in select_parts(adapter, [Part.B]).items()}
        return adapter | _draw_of_size(federation, client_id, owner=SHARED_OWNER, round_num=round_num) | zeros
    return adapter


def load_serving(federation: Federation, state: FederationState, client_ids: Sequence[str]) -> None:
    """Make the resident model the one that a client serves now, or a stack of those that several clients serve."""
    federation.resident.serve_stack(
        [serving_adapter(federation, state, client_id) for client_id in client_ids],
        sizes=[federation.sizes.of(client_id) for client_id in client_ids],
        base_deltas=select_deltas(state.server.extra),
    )


def serves_one_model(federation: Federation) -> bool:
    """Whether all clients serve the same adapter: nothing personal, one rank."""
    return not federation.method.personal_parts() and not federation.sizes.clients


def _keeps_own_a(federation: Federation) -> bool:
    return Part.A in federation.method.personal_parts() and federation.init in ("independent", "local")


def _own_draw(federation: Federation, client_id: str) -> dict[str, Tensor]:
    """A client's own A."""
    return _draw_of_size(federation, client_id, owner=client_id, round_num=1)


def _draw_of_size(federation: Federation, client_id: str, *, owner: str | int, round_num: int) -> dict[str, Tensor]:
    """The first rows of a draw at the server's rank, as many as a client's rank."""
    sizes = federation.sizes
    rank = sizes.draw_rank or sizes.server.rank
    drawn = draw_a(federation.resident.layout, rank, seed=federation.seed, owner=owner, round_num=round_num)
    return {name: tensor[: sizes.of(client_id).rank] for name, tensor in drawn.items()}


def _of_size(federation: Federation, tensors: Tensors, client_id: str) -> dict[str, Tensor]:
    """Factors of the server's rank at a client's."""
    sizes = federation.sizes
    return dict(client_factors(federation.method, tensors, server=sizes.server, client=sizes.of(client_id)))
