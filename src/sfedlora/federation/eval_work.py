"""Evaluation cut into pieces: which clients share forward passes, and what they serve.

A piece carries its adapters, so any process with the federation's model and data gives the same result. Not here: which
clients are evaluated when (`round`), and the forward passes (`evaluate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sfedlora.federation.evaluate import EvalResult, evaluate_examples, evaluate_stack
from sfedlora.federation.memory import is_out_of_memory, warn_of_halving
from sfedlora.federation.state import Federation, FederationState, serves_one_model, serving_adapter
from sfedlora.lora.base_delta import select_deltas
from sfedlora.types import LoraSize, Tensors

__all__ = ["EvalWork", "Split", "evaluate_work", "external_works", "split_works"]

MAX_EVALUATED_TOGETHER = 32
"""Clients that are evaluated in common batches where they serve one model; a stop waits for so many."""
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EvalWork:
    """The evaluation of clients that share forward passes.

    Attributes:
        client_ids: whose results are wanted.
        adapters: the complete adapter of each, or the one that all of them serve.
        sizes: rank and gamma of each adapter.
        base_deltas: corrections of the frozen weights, by their names in `ServerState.extra`.
        groups: positions of each client's examples.
        external: the further example set that they are positions in; None for the clients' own data.
    """

    client_ids: tuple[str, ...]
    adapters: tuple[Tensors, ...]
    sizes: tuple[LoraSize, ...]
    base_deltas: Tensors
    groups: tuple[Sequence[int], ...]
    external: Split | None = None


def split_works(
    federation: Federation, state: FederationState, split: Split, client_ids: Sequence[str]
) -> Iterator[EvalWork]:
    """Clients on a split of their own data, in their order; together where they serve one model or are stacked."""
    one_model, left = serves_one_model(federation), client_ids
    while left:
        together = MAX_EVALUATED_TOGETHER if one_model else federation.runner.clients_per_batch
        clients, left = left[:together], left[together:]
        groups = tuple(getattr(federation.splits[client_id], split) for client_id in clients)
        yield _work(federation, state, clients, clients[:1] if one_model else clients, groups)


def external_works(
    federation: Federation, state: FederationState, split: Split, client_ids: Sequence[str]
) -> Iterator[EvalWork]:
    """Clients on the extra file of a split, one by one; the first stands for all where they serve one model."""
    everything = range(len(federation.external[split]))
    for client_id in client_ids[:1] if serves_one_model(federation) else client_ids:
        yield replace(_work(federation, state, [client_id], [client_id], (everything,)), external=split)


def evaluate_work(federation: Federation, work: EvalWork) -> list[EvalResult]:
    """One result per client; the federation's resident model is left as it was evaluated.

    A stack that memory does not hold is evaluated in halves, and the runner stacks no more than half as many from then
    on: training takes more than evaluation does.
    """
    reason = ""
    try:
        return _evaluate_together(federation, work)
    except (RuntimeError, MemoryError) as error:
        if len(work.adapters) == 1 or not is_out_of_memory(error):
            raise
        reason = type(error).__name__
    half = (len(work.adapters) + 1) // 2
    federation.runner.stack_at_most(half)
    warn_of_halving(len(work.adapters), half, reason)
    first, second = _halves(work, half)
    return evaluate_work(federation, first) + evaluate_work(federation, second)


def _evaluate_together(federation: Federation, work: EvalWork) -> list[EvalResult]:
    federation.resident.serve_stack(work.adapters, sizes=work.sizes, base_deltas=work.base_deltas)
    evaluate = evaluate_examples if len(work.adapters) == 1 else evaluate_stack
    return evaluate(
        federation.resident,
        federation.data if work.external is None else federation.external[work.external],
        work.groups,
        task=federation.task,
        batching=federation.batching,
        pad_token_id=federation.pad_token_id,
    )


def _halves(work: EvalWork, half: int) -> tuple[EvalWork, EvalWork]:
    parts = [
        replace(
            work,
            client_ids=work.client_ids[part],
            adapters=work.adapters[part],
            sizes=work.sizes[part],
            groups=work.groups[part],
        )
        for part in (slice(None, half), slice(half, None))
    ]
    return parts[0], parts[1]


def _work(
    federation: Federation,
    state: FederationState,
    client_ids: Sequence[str],
    served: Sequence[str],
    groups: tuple[Sequence[int], ...],
) -> EvalWork:
    return EvalWork(
        tuple(client_ids),
        tuple(serving_adapter(federation, state, client_id) for client_id in served),
        tuple(federation.sizes.of(client_id) for client_id in served),
        select_deltas(state.server.extra),
        groups,
    )
