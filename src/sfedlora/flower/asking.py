"""What the server asks a site for in a round, and what it takes for an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sfedlora.flower.exchange import Lost
from sfedlora.flower.protocol import (
    Envelope,
    MessageError,
    RoundReply,
    RoundRequest,
    SecureRound,
    open_facts,
    open_failure,
    open_masked,
    open_tensors,
    seal,
)
from sfedlora.flower.site import EXTRA, INITIAL, SHARED
from sfedlora.lora.base_delta import select_deltas
from sfedlora.methods import client_factors
from sfedlora.setup.server import PreparedServer
from sfedlora.types import Part, ServerState, Tensors, select_parts

__all__ = ["LostStateError", "Task", "open_masked_reply", "open_reply", "request_of"]


class LostStateError(MessageError):
    """A site no longer has the B that it is asked to use."""


@dataclass(frozen=True)
class Task:
    """What a site is to do with a state.

    Attributes:
        client_id: which site.
        num_examples: its training examples, as it joined.
        personal_round: the round whose B it is to use; 0: none yet.
        kept_round: a further round whose B it must keep; 0: none.
        evaluate: the splits to evaluate.
        train: whether to train then.
        write_adapter: whether to write its adapter.
        secure: the secure sum that its change is to enter, if it trains; None: it sends its factors.
    """

    client_id: str
    num_examples: int
    personal_round: int
    kept_round: int = 0
    evaluate: tuple[Literal["validation", "test"], ...] = ()
    train: bool = False
    write_adapter: bool = False
    secure: SecureRound | None = None


def request_of(server: PreparedServer, state: ServerState, task: Task) -> Envelope:
    """The message that carries a task: the shared factors and base deltas, all of them.

    A site without a B of its own also gets the server's initial head; in a secure round all do, since what sites are
    told must be alike.
    """
    rules, method, flower = server.rules, server.rules.method, server.config.flower
    size = rules.sizes.of(task.client_id)
    shared = client_factors(method, state.shared, server=rules.sizes.server, client=size)
    tensors = {SHARED + name: tensor for name, tensor in shared.items()}
    tensors |= {EXTRA + name: tensor for name, tensor in select_deltas(state.extra).items()}
    if task.personal_round == 0 or task.secure is not None:
        own = select_parts(server.initial, method.personal_parts() - {Part.B})
        own = dict(client_factors(method, own, server=rules.sizes.server, client=size))
        tensors |= {INITIAL + name: tensor for name, tensor in own.items()}
    request = RoundRequest(
        federation_id=flower.federation_id or "",
        client_id=task.client_id,
        round_num=state.round_num + 1,
        rank=size.rank,
        scaling=size.scaling,
        draw_rank=rules.sizes.server.rank,
        scaling_clients=server.scaling_clients,
        personal_round=task.personal_round,
        kept_rounds=[task.kept_round] if task.kept_round else [],
        evaluate=list(task.evaluate),
        train=task.train,
        write_adapter=task.write_adapter,
        metrics=flower.metrics != "none",
        wire_dtype=flower.wire_dtype if task.secure is None else "uint32",
        secure=task.secure,
    )
    return seal(request, tensors, dtype=flower.wire_dtype)


def open_reply(
    server: PreparedServer, state: ServerState, task: Task, answer: Envelope | Lost
) -> tuple[RoundReply, Tensors]:
    """A checked reply to a task, and the factors in it.

    Raises:
        MessageError: there is none, it reports a failure, or it is not what was asked for.
    """
    reply, opened, expected = _checked(server, state, task, answer)
    if task.train and opened.dtype != server.config.flower.wire_dtype:
        raise MessageError(f"factors in {opened.dtype}; asked for {server.config.flower.wire_dtype}")
    return reply, open_tensors(opened, reply.layout, expected)


def open_masked_reply(
    server: PreparedServer, state: ServerState, task: Task, answer: Envelope | Lost
) -> tuple[RoundReply, NDArray[np.uint32]]:
    """`open_reply` in a secure round: what comes is whole numbers under masks, of which no value can be checked."""
    reply, opened, expected = _checked(server, state, task, answer)
    return reply, open_masked(opened, reply.layout, expected)


def _checked(
    server: PreparedServer, state: ServerState, task: Task, answer: Envelope | Lost
) -> tuple[RoundReply, Envelope, Mapping[str, tuple[int, ...]]]:
    """The facts of a reply, the message itself, and which factors it must hold."""
    if isinstance(answer, Lost):
        raise MessageError(answer.reason)
    failure = open_failure(answer)
    if failure is not None:
        kind = LostStateError if failure.code == "lost-state" else MessageError
        raise kind(f"the site failed with code {failure.code!r}; its own log says why")
    reply, round_num = open_facts(answer, RoundReply), state.round_num + 1
    if (reply.client_id, reply.round_num) != (task.client_id, round_num):
        raise MessageError(
            f"a reply of client {reply.client_id!r} for round {reply.round_num}; expected {task.client_id!r} and round "
            f"{round_num}"
        )
    _require_as_asked(server, task, reply)
    rules = server.rules
    parts = rules.method.shared_parts(round_num) if task.train else ()
    return reply, answer, server.skeleton.layout.shapes(rules.sizes.of(task.client_id).rank, parts)


def _require_as_asked(server: PreparedServer, task: Task, reply: RoundReply) -> None:
    """Refuse a reply that states more, less or other things than the task asked for.

    Raises:
        MessageError: what differs.
    """
    if reply.trained != task.train:
        raise MessageError("an update that was not asked for" if reply.trained else "no update in the reply")
    if reply.num_examples != task.num_examples:
        raise MessageError(f"states {reply.num_examples} training examples; it joined with {task.num_examples}")
    if reply.personal_round != task.personal_round:
        raise MessageError(f"used the B of round {reply.personal_round}; asked for that of {task.personal_round}")
    is_measured = server.config.flower.metrics != "none"
    if reply.evaluated.keys() != set(task.evaluate if is_measured else ()):
        raise MessageError(f"evaluated {sorted(reply.evaluated)}; asked for {sorted(task.evaluate)}")
    if (reply.measured is not None) != (is_measured and task.train):
        raise MessageError("measurements that were not asked for" if reply.measured else "no measurements in the reply")
