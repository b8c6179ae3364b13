"""What a site does with a message: evaluate with its own B, train, keep B, answer with what the round shares.

The site is a federation of one client, so all of this is the local runner's code. Whatever goes wrong here is logged
here; the server learns the kind of failure only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sfedlora.artifacts import adapter_facts, write_served
from sfedlora.errors import (
    ClientError,
    ConfigError,
    DataError,
    InputError,
    ModelError,
    SfedLoraError,
    StorageError,
)
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainMetrics
from sfedlora.federation.eval_work import evaluate_work, split_works
from sfedlora.federation.evaluate import EvalResult
from sfedlora.federation.memory import is_out_of_memory
from sfedlora.federation.round import gain_of, make_work, with_outcomes
from sfedlora.federation.state import Federation, FederationState, serving_adapter
from sfedlora.flower.protocol import (
    LARGEST,
    PROTOCOL,
    Envelope,
    Evaluated,
    Failure,
    FailureCode,
    HelloReply,
    HelloRequest,
    Measured,
    MessageError,
    RoundReply,
    RoundRequest,
    open_facts,
    open_tensors,
    seal,
    seal_masked,
)
from sfedlora.flower.secure_round import SecurePart, secure_part
from sfedlora.flower.settings import SiteSettings, app_config, site_settings
from sfedlora.flower.site_store import SiteStore
from sfedlora.lora.base_delta import select_deltas
from sfedlora.privacy.mechanism import NOISE_KEY, noise_key, privatized
from sfedlora.privacy.noise import derive_key
from sfedlora.privacy.secure_sum import LimitError
from sfedlora.setup.environment import library_versions
from sfedlora.setup.site import SiteData, adapt_site, load_site
from sfedlora.storage import directory_written_whole
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Tensors, select_parts

__all__ = ["EXTRA", "INITIAL", "SHARED", "Site", "open_site"]

_LOG = logging.getLogger(__name__)
SHARED, EXTRA, INITIAL = "shared/", "extra/", "initial/"
"""What the names of a request's tensors begin with."""
_FAILURES: tuple[tuple[type[Exception], FailureCode], ...] = (
    (MessageError, "message"),
    (DataError, "data"),
    (ModelError, "model"),
    (ConfigError, "settings"),
    (InputError, "settings"),
    (StorageError, "state"),
    (LimitError, "limit"),
)


class Site:
    """Owner of a site's base model, which is loaded when it is first needed and adapted once per rank."""

    def __init__(self, settings: SiteSettings) -> None:
        """Take the settings; nothing is loaded yet."""
        self._settings = settings
        self._data: SiteData | None = None
        self._federation: Federation | None = None

    def answer(self, envelope: Envelope, position: int = 0) -> Envelope:
        """Do what a message asks for; never raises.

        Args:
            envelope: the message.
            position: in a simulation, which client is asked, counted in client-id order.
        """
        try:
            return self._answer(envelope, position)
        except ClientError as error:
            _LOG.error("%s", error)
            return seal(Failure(code=_kind_of(error)))
        except _LostStateError:
            _LOG.error("the state that the server asks for is not here; the next round starts from B = 0")
            return seal(Failure(code="lost-state"))
        except SfedLoraError as error:
            _LOG.error("%s", error)
            known: list[FailureCode] = [code for kind, code in _FAILURES if isinstance(error, kind)]
            return seal(Failure(code=known[0] if known else "internal"))
        except Exception as error:
            _LOG.exception("the site could not answer")
            return seal(Failure(code="memory" if is_out_of_memory(error) else "internal"))

    def _answer(self, envelope: Envelope, position: int) -> Envelope:
        handlers: dict[str, Callable[[Envelope, str], Envelope]] = {"hello": self._hello, "round": self._round}
        try:
            kind = json.loads(envelope.facts)["kind"]
            handler = handlers[kind]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise MessageError(f"expected a message of kind {' or '.join(handlers)}") from None
        return handler(envelope, self._client_id(position))

    def _hello(self, envelope: Envelope, client_id: str) -> Envelope:
        request, settings = open_facts(envelope, HelloRequest), self._settings
        if request.protocol != PROTOCOL:
            raise MessageError(f"the server speaks version {request.protocol} of the protocol, this site {PROTOCOL}")
        if request.federation_id != settings.config.flower.federation_id:
            raise MessageError(f"a message for federation {request.federation_id!r}; this site belongs to another")
        if request.config_sha256 != settings.digest:
            raise MessageError("the server has another configuration than the app that this site runs")
        data = self._loaded()
        return seal(
            HelloReply(
                client_id=client_id,
                num_examples=len(data.splits[client_id].train),
                base_sha256=data.base.sha256,
                dtype=data.base.dtype,
                versions=library_versions(),
            )
        )

    def _round(self, envelope: Envelope, client_id: str) -> Envelope:
        request, data = open_facts(envelope, RoundRequest), self._loaded()
        if request.federation_id != self._settings.config.flower.federation_id:
            raise MessageError(f"a message for federation {request.federation_id!r}; this site belongs to another")
        if request.client_id != client_id:
            raise MessageError(f"a message for client {request.client_id!r}; this site is {client_id!r}")
        self._require_sound(request)
        store = SiteStore.at(self._settings.state_dir, request.federation_id, client_id)
        store.remove_leftovers()
        if request.personal_round and request.personal_round not in store.rounds():
            raise _LostStateError
        num_examples = len(data.splits[client_id].train)
        part = secure_part(self._settings, request, envelope, num_examples=num_examples, rounds=store.rounds())
        tensors = open_tensors(envelope, request.layout, None)
        federation = self._adapted(request)
        state = _state_of(federation, request, tensors, store)
        federation = replace(federation, initial={**federation.initial, **_initial_of(federation, request, tensors)})
        evaluated = {split: _evaluate(federation, state, client_id, split) for split in request.evaluate}
        if request.write_adapter:
            self._write_adapter(federation, state, request, store)
        reply = RoundReply(
            client_id=client_id,
            round_num=request.round_num,
            num_examples=num_examples,
            trained=request.train,
            personal_round=request.personal_round,
            evaluated={split: _sent(result) for split, result in evaluated.items()} if request.metrics else {},
        )
        if not request.train:
            return seal(reply)
        outcome, work = _train(federation, state, client_id)
        if request.metrics:
            gain = gain_of(work.start, work.size.scaling)
            reply = reply.model_copy(update={"measured": _measured(outcome.metrics, gain)})
        update: Tensors = select_parts(outcome.tensors, federation.method.shared_parts(request.round_num))
        privacy = federation.rounds.privacy
        if privacy is not None and privacy.mode == "local":
            key = derive_key(noise_key(privacy, state.server), "client", client_id)
            update = privatized(privacy, work.start, update, round_num=request.round_num, key=key).tensors
        answer = _sealed(federation, state, request, reply, update, part)
        after = with_outcomes(federation, state, {client_id: outcome})
        store.save(request.round_num, after.personal[client_id], after.optimizer.get(client_id, {}))
        store.keep({request.round_num, request.personal_round, *request.kept_rounds})
        return answer

    def _require_sound(self, request: RoundRequest) -> None:
        """Refuse what no server of this configuration asks for.

        Raises:
            MessageError: another rank, or the B of a round that is not over.
        """
        rank = self._settings.config.lora.rank
        ranks = {rank} if isinstance(rank, int) else {*rank}
        if not {request.rank, request.draw_rank} <= ranks:
            raise MessageError(f"rank {request.rank} of {request.draw_rank}; the configuration has {sorted(ranks)}")
        if request.personal_round >= request.round_num:
            raise MessageError(f"round {request.round_num} cannot start from the B of round {request.personal_round}")

    def _loaded(self) -> SiteData:
        if self._data is None:
            settings = self._settings
            self._data = load_site(settings.config, settings.client_id)
        return self._data

    def _client_id(self, position: int) -> str:
        if self._settings.client_id is not None:
            return self._settings.client_id
        client_ids = sorted(self._loaded().splits)
        if position >= len(client_ids):
            raise ConfigError(
                f"simulated node {position} has no client: the partition makes {len(client_ids)}; give num-supernodes="
                f"{len(client_ids)}"
            )
        return client_ids[position]

    def _adapted(self, request: RoundRequest) -> Federation:
        """The site's federation with the rank and gamma of a request."""
        size = LoraSize(request.rank, request.scaling)
        sizes = LoraSizes(size, draw_rank=request.draw_rank)
        if self._federation is not None and self._federation.sizes.server.rank != request.rank:
            self._federation, self._data = None, None  # the base model is adapted in place, once
        if self._federation is None:
            self._federation = adapt_site(self._loaded(), sizes=sizes)
        self._federation = replace(self._federation, sizes=sizes)
        return self._federation

    def _write_adapter(
        self, federation: Federation, state: FederationState, request: RoundRequest, store: SiteStore
    ) -> None:
        data = self._loaded()
        facts = adapter_facts(
            data.config,
            layout=federation.resident.layout,
            target_suffixes=federation.resident.target_suffixes,
            base_model_name=data.base.name_or_path,
            scaling_clients=request.scaling_clients,
        )
        tensors = serving_adapter(federation, state, request.client_id)
        with directory_written_whole(store.path / "adapter", private=True) as folder:  # nobody may ask for it again
            write_served(folder, tensors, state.server.extra, federation.sizes.server, facts, private=True)


def _kind_of(error: ClientError) -> FailureCode:
    if "emory" in error.reason:
        return "memory"
    return "diverged" if "NaN" in error.reason else "training"


def open_site(settings: str) -> Site:
    """The site of an app.

    Args:
        settings: JSON of the configuration's path, the run's settings and the node's.

    Raises:
        ConfigError: they cannot be used.
    """
    given = json.loads(settings)
    return Site(site_settings(app_config(Path(given["config"]), given["run"]), given["node"]))


class _LostStateError(SfedLoraError):
    """The round whose B the server asks for is not in the store."""


def _state_of(federation: Federation, request: RoundRequest, tensors: Tensors, store: SiteStore) -> FederationState:
    """The state after the round before the open one, as far as this site is concerned."""
    shared, extra = _without(SHARED, tensors), _without(EXTRA, tensors)
    if not all(name.startswith((SHARED, EXTRA, INITIAL)) for name in tensors):
        raise MessageError("a tensor that is neither shared, nor extra, nor initial")
    parts = frozenset(Part) - federation.method.personal_parts()
    shapes = federation.resident.layout.shapes(request.rank, parts)
    if {name: tuple(tensor.shape) for name, tensor in shared.items()} != shapes:
        raise MessageError("the shared factors are not those of this model, method and rank")
    if select_deltas(extra).keys() != extra.keys():
        raise MessageError("what comes besides shared factors is no base delta")
    server = ServerState(request.round_num - 1, shared, extra | _secret(federation, store))
    if not request.personal_round:
        return FederationState(server, {}, {})
    personal, moments = store.load(request.personal_round)
    own = federation.resident.layout.shapes(request.rank, federation.method.personal_parts())
    if {name: tuple(tensor.shape) for name, tensor in personal.items()} != own:
        raise StorageError(
            f"{store.path}: round {request.personal_round} is the state of another model, method or rank; use another "
            "flower.federation_id or state directory"
        )
    client_id = request.client_id
    return FederationState(server, {client_id: personal}, {client_id: moments} if moments else {})


def _initial_of(federation: Federation, request: RoundRequest, tensors: Tensors) -> Tensors:
    """The server's initial values of personal factors, for a site that has none of its own yet."""
    initial = _without(INITIAL, tensors)
    shapes = federation.resident.layout.shapes(request.rank, federation.method.personal_parts())
    for name, tensor in initial.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise MessageError(f"initial value of {name!r} is none of this model, method and rank")
    return initial


def _evaluate(federation: Federation, state: FederationState, client_id: str, split: str) -> EvalResult:
    [work] = split_works(federation, state, split, [client_id])  # type: ignore[arg-type]
    [result] = evaluate_work(federation, work)
    return result


def _secret(federation: Federation, store: SiteStore) -> dict[str, Tensor]:
    """The site's own key, where it adds noise that nobody else may know; under the name of a local run's."""
    rounds = federation.rounds
    central = rounds.privacy is not None and rounds.privacy.mode == "central"
    privacies = [one for one in (None if central else rounds.privacy, rounds.example_privacy) if one is not None]
    if all(one.noise_seed is not None for one in privacies):
        return {}
    return {NOISE_KEY: torch.frombuffer(bytearray(store.secret_key()), dtype=torch.uint8)}


def _train(federation: Federation, state: FederationState, client_id: str) -> tuple[ClientOutcome, ClientWork]:
    """The client's outcome, and the work that it came from."""
    work = make_work(federation, state, client_id)
    [result] = federation.runner.run_cohort([work])
    if isinstance(result, ClientError):
        raise result
    return result, work


def _sealed(  # noqa: PLR0917 - what is sent, and how
    federation: Federation,
    state: FederationState,
    request: RoundRequest,
    reply: RoundReply,
    update: Tensors,
    part: SecurePart | None,
) -> Envelope:
    """A reply with the factors that the site sends, or with its message of a secure sum."""
    if part is None:
        return seal(reply, update, dtype=request.wire_dtype)
    shapes = federation.resident.layout.shapes(request.rank, federation.method.shared_parts(request.round_num))
    return seal_masked(reply, shapes, part.message(state.server.shared, update, list(shapes)))


def _measured(metrics: TrainMetrics, gain: float) -> Measured:
    return Measured(
        train_loss=_finite(metrics.train_loss),
        grad_norm_a=_finite(metrics.grad_norm_a),
        grad_norm_b=_finite(metrics.grad_norm_b),
        gain=_finite(gain),
        tokens=metrics.tokens,
        padded_tokens=metrics.padded_tokens,
        num_steps=metrics.num_steps,
    )


def _sent(result: EvalResult) -> Evaluated:
    return Evaluated(
        num_examples=result.num_examples,
        loss=_finite(result.loss),
        accuracy=_finite(result.accuracy),
        macro_f1=_finite(result.macro_f1),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) <= LARGEST else None


def _without(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
