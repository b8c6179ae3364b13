"""Greedy answers of a run's untouched base model and of one client's adapter, to read beside the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sfedlora.errors import InputError
from sfedlora.experiment import load_state
from sfedlora.federation.state import FederationState, load_serving
from sfedlora.setup import Prepared
from sfedlora.types import Part

__all__ = ["Answer", "answer_before_and_after", "sample_answers"]


@dataclass(frozen=True)
class Answer:
    """One prompt of a client's test split, its reference, and what the model says before and after the run."""

    client_id: str
    prompt: str
    reference: str
    before: str
    after: str


def answer_before_and_after(run_dir: Path, *, client_id: str | None = None, max_new_tokens: int = 32) -> Answer:
    """Continue the first prompt of a client's test split without and with the client's last adapter.

    Args:
        run_dir: a causal-lm run with at least one checkpoint.
        client_id: the client; None: the first.
        max_new_tokens: longest answer in tokens.

    Raises:
        InputError: no such client, or a run of another task.
    """
    prepared, state = load_state(run_dir)
    chosen = min(prepared.federation.splits) if client_id is None else client_id
    return _answer(prepared, state, run_dir, chosen, max_new_tokens)


def sample_answers(run_dir: Path, num_clients: int, *, max_new_tokens: int = 32) -> list[Answer]:
    """`answer_before_and_after` of the first clients, with the model loaded once."""
    prepared, state = load_state(run_dir)
    chosen = sorted(prepared.federation.splits)[:num_clients]
    return [_answer(prepared, state, run_dir, client_id, max_new_tokens) for client_id in chosen]


def _answer(prepared: Prepared, state: FederationState, run_dir: Path, client_id: str, max_new_tokens: int) -> Answer:
    federation = prepared.federation
    if client_id not in federation.splits or federation.data.label_starts is None:
        raise InputError(f"{run_dir}: no causal-lm client {client_id!r}; clients are {', '.join(federation.splits)}")
    row = federation.splits[client_id].test[0]
    tokens = federation.data.example_tokens(row)
    start = int(federation.data.label_starts[row])
    prompt = torch.from_numpy(tokens[:start].astype("int64"))[None]
    load_serving(federation, state, [client_id])
    after = _generate(prepared, prompt, max_new_tokens)
    federation.resident.flat(Part.B).zero_()
    federation.resident.set_base_deltas({})
    return Answer(
        client_id,
        _decode(prepared, prompt[0]),
        _decode(prepared, torch.from_numpy(tokens[start:].astype("int64"))),
        _generate(prepared, prompt, max_new_tokens),
        after,
    )


def _generate(prepared: Prepared, prompt: torch.Tensor, max_new_tokens: int) -> str:
    federation = prepared.federation
    ids = prompt.to(federation.resident.device)
    output = federation.resident.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=federation.pad_token_id,
    )
    return _decode(prepared, output[0, ids.shape[1] :])


def _decode(prepared: Prepared, ids: torch.Tensor) -> str:
    text = prepared.base.tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(str(text).split())
