"""The mappings of clients that a state carries: plain dictionaries, or clients in memory over clients elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch

from sfedlora.federation.state import with_clients
from sfedlora.types import Tensors


class Elsewhere(Mapping[str, Tensors]):
    """Clients that cost something to read: who was read is noted."""

    def __init__(self, **clients: float) -> None:
        self._clients = clients
        self.was_read: list[str] = []

    def __getitem__(self, client_id: str) -> Tensors:
        value = self._clients[client_id]
        self.was_read.append(client_id)
        return {"b:x": torch.tensor(value)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._clients


def one(value: float) -> Tensors:
    return {"b:x": torch.tensor(value)}


@pytest.mark.parametrize("in_memory", [True, False])
def test_changed_clients_replace_theirs(in_memory: bool) -> None:
    below: Mapping[str, Tensors] = {"a": one(1), "b": one(2)} if in_memory else Elsewhere(a=1, b=2)
    first = with_clients(below, {"b": one(20), "c": one(30)})
    second = with_clients(first, {"c": one(300), "d": one(400)})
    for clients, expected in (
        (below, {"a": 1, "b": 2}),
        (first, {"a": 1, "b": 20, "c": 30}),
        (second, {"a": 1, "b": 20, "c": 300, "d": 400}),
    ):
        assert {key: float(clients[key]["b:x"]) for key in clients} == expected
        assert len(clients) == len(expected)
        assert list(clients) == list(expected)
        assert "a" in clients
        assert "z" not in clients
        assert clients.get("z") is None
    assert type(second) is (dict if in_memory else type(first))


def test_a_change_reads_no_client() -> None:
    below = Elsewhere(a=1, b=2)
    changed = with_clients(with_clients(below, {"b": one(20)}), {"c": one(3)})
    assert len(changed) == 3
    assert sorted(changed) == ["a", "b", "c"]
    assert "a" in changed
    assert below.was_read == []
    changed["b"], changed["a"], changed["a"]
    assert below.was_read == ["a", "a"]
