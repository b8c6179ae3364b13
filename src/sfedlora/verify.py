"""Recomputes a round of a run from the checkpoint before it, and tells the first difference to what the run recorded.

Nothing of the run is changed. Equal are the bits of the server's state and of every client's, and each metric of the
round but the seconds; of the last round of a finished run the adapters, too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfedlora.artifacts import RunDirectory
from sfedlora.errors import InputError, StorageError
from sfedlora.experiment import load_state, write_adapter
from sfedlora.federation.round import RoundFinished, run_round
from sfedlora.federation.runners.workers import running
from sfedlora.federation.state import FederationState
from sfedlora.setup import Prepared
from sfedlora.storage import read_tensors, to_json
from sfedlora.types import Tensors

__all__ = ["Difference", "Verdict", "verify_round"]

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Difference:
    """The first place where a run is not what its configuration gives.

    Attributes:
        where: file, and tensor with index or key.
        expected: what was recomputed.
        found: what the run recorded.
    """

    where: str
    expected: str
    found: str


@dataclass(frozen=True)
class Verdict:
    """What a recomputation showed.

    Attributes:
        round_num: the round.
        num_tensors: compared tensors.
        num_metrics: compared keys of the round's line in metrics.jsonl.
        difference: the first one, or None.
    """

    round_num: int
    num_tensors: int
    num_metrics: int
    difference: Difference | None


def verify_round(run_dir: Path, round_num: int | None = None) -> Verdict:
    """Recompute one round.

    Args:
        run_dir: a run directory.
        round_num: the round; None: the last one whose state before is kept, too.

    Raises:
        InputError: no run directory, the round or the one before it is not kept, or data or model have changed since.
        StorageError: a file is damaged.
    """
    directory = RunDirectory.open(run_dir)
    directory.check_usable()
    chosen = _chosen(directory, round_num)
    lines = {record["round_num"]: record for record in directory.metrics()}
    if chosen not in lines:
        raise StorageError(f"{directory.path / 'metrics.jsonl'}: has no line of round {chosen}")
    found = directory.checkpoints.verify(chosen, set()).state
    prepared, before = load_state(run_dir, chosen - 1)
    recorded = lines.get(chosen - 1, {}).get("clients_per_batch")
    if isinstance(recorded, int):
        prepared.federation.runner.stack_at_most(recorded)
    finished = _recomputed(prepared, before)
    after: dict[str, Any] = json.loads(to_json(finished.record))
    compared = _Compared()
    differences = chain(
        _of_states(finished.state, found, sorted({*after["cohort"]} - after["excluded"].keys()), compared),
        _of_records("metrics.jsonl", after, lines[chosen], compared),
        _of_adapters(directory, prepared, finished.state, compared),
    )
    difference = next(differences, None)
    return Verdict(chosen, compared.tensors, compared.metrics, difference)


@dataclass
class _Compared:
    """How much was compared so far."""

    tensors: int = 0
    metrics: int = 0


def _chosen(directory: RunDirectory, round_num: int | None) -> int:
    kept = directory.checkpoints.rounds()
    possible = [number for number in kept if number - 1 in kept]
    if round_num is None and possible:
        return possible[-1]
    if round_num in possible:
        return round_num
    shown = ", ".join(map(str, possible)) or "none"
    raise InputError(
        f"{directory.path}: round {round_num if round_num is not None else kept[-1:] or 1} cannot be recomputed, which "
        f"takes its checkpoint and the one before; kept are the rounds {kept}, possible is {shown}"
    )


def _recomputed(prepared: Prepared, before: FederationState) -> RoundFinished:
    with running(prepared.federation.runner):
        for event in run_round(prepared.federation, before, {}):
            if isinstance(event, RoundFinished):
                return event
    raise StorageError("the round ended without a result")


def _of_states(
    after: FederationState, found: FederationState, changed: Sequence[str], compared: _Compared
) -> Iterator[Difference]:
    """Differences of the server's state and of the clients that the round changed."""
    round_num = after.server.round_num
    folder = f"checkpoints/round-{round_num:06d}"
    yield from _of_tensors(f"{folder}/server.safetensors", _of_server(after), _of_server(found), compared)
    for kind, ours, theirs in (
        ("personal", after.personal, found.personal),
        ("optimizer", after.optimizer, found.optimizer),
    ):
        if set(ours) != set(theirs):
            yield Difference(f"{folder}/clients.json, {kind}", str(sorted(ours)), str(sorted(theirs)))
        for client_id in changed:
            if client_id in ours and client_id in theirs:
                where = f"checkpoints/{kind}/{round_num:06d}, client {client_id!r}"
                yield from _of_tensors(where, ours[client_id], theirs[client_id], compared)


def _of_server(state: FederationState) -> dict[str, Tensor]:
    server = state.server
    named = {f"shared/{name}": tensor for name, tensor in server.shared.items()}
    return named | {f"extra/{name}": tensor for name, tensor in server.extra.items()}


def _of_adapters(
    directory: RunDirectory, prepared: Prepared, after: FederationState, compared: _Compared
) -> Iterator[Difference]:
    """Differences of the adapters, if the run has finished with this round."""
    summary = directory.summary()
    if not summary or summary["last"]["round_num"] != after.server.round_num:
        return
    for client_id in (None, *sorted(after.personal)):
        path = directory.adapter_path(client_id)
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(prepared, after, client_id, Path(scratch))
            where = f"{path.relative_to(directory.path).as_posix()}/{_WEIGHTS}"
            ours, theirs = read_tensors(Path(scratch) / _WEIGHTS), read_tensors(path / _WEIGHTS)
            yield from _of_tensors(where, ours, theirs, compared)


def _of_tensors(where: str, expected: Tensors, found: Tensors, compared: _Compared) -> Iterator[Difference]:
    """Differences of names, shapes, types and bits; per tensor the first one."""
    if expected.keys() != found.keys():
        yield Difference(where, f"the tensors {sorted(expected)}", f"{sorted(found)}")
        return
    for name in sorted(expected):
        ours, theirs = expected[name].contiguous(), found[name].contiguous()
        compared.tensors += 1
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            shapes = [f"{tensor.dtype} of shape {list(tensor.shape)}" for tensor in (ours, theirs)]
            yield Difference(f"{where}, tensor {name}", *shapes)
            continue
        unequal = (_bytes(ours) != _bytes(theirs)).any(dim=-1).reshape(ours.shape)
        if bool(unequal.any()):
            index = tuple(unequal.nonzero()[0].tolist())
            place = f"{where}, tensor {name}, index {list(index)}"
            yield Difference(place, repr(ours[index].item()), repr(theirs[index].item()))


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of each value of a tensor (..., itemsize): -0.0 and NaN are compared as bits."""
    return tensor.reshape(-1, 1).view(torch.uint8)


def _of_records(where: str, expected: Any, found: Any, compared: _Compared, key: str = "") -> Iterator[Difference]:
    """Differences of two JSON values, seconds left out; the deepest key is named."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in (*expected, *(name for name in found if name not in expected)):
            if not name.endswith("_seconds"):
                dotted = f"{key}.{name}" if key else name
                there = (expected.get(name, "no such key"), found.get(name, "no such key"))
                yield from _of_records(where, *there, compared, dotted)
        return
    compared.metrics += 1
    if expected != found:
        yield Difference(f"{where}, {key}", repr(expected), repr(found))
