"""Tensors in a spool: bits, what is read when, damage, lifetime; rounds of a large cohort with and without one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfedlora.errors import StorageError
from sfedlora.federation import round as round_module
from sfedlora.federation.client import ClientOutcome, ClientWork, TrainMetrics
from sfedlora.federation.round import ClientTrained, RoundFinished, run_rounds
from sfedlora.federation.spool import Spool, SpooledTensors, num_bytes, select_lazily
from sfedlora.federation.state import FederationState, initial_state
from sfedlora.types import Part
from support.full_disk import largest_file
from support.tiny_federation import ROUNDS, TRAINING, tiny_federation

BLOCK = torch.arange(40, dtype=torch.float32)
TENSORS = {
    "b:last.in.the.alphabet": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a:bfloat16": torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "a:a view": BLOCK[3:15].view(3, 4),
    "a:another view": BLOCK[15:35].view(5, 4),
    "a:with gaps": torch.arange(24.0, dtype=torch.float64).view(4, 6)[:, ::2],
    "head:a scalar": torch.tensor(7.0),
    "head:empty": torch.zeros(0, 3),
    "head:not numbers": torch.tensor([float("nan"), float("-inf"), -0.0]),
    "head:half": torch.ones(2, dtype=torch.float16),
    "head:eight bits": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    "head:integers": torch.tensor([2**62, -1]),
    "head:flags": torch.tensor([True, False, True]),
}


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_bits_names_and_order(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spooled = spool.put("client/..\\7", TENSORS)
        assert list(spooled) == list(TENSORS)
        assert {name: _bits(tensor) for name, tensor in spooled.items()} == {n: _bits(t) for n, t in TENSORS.items()}
        [file] = _files(tmp_path)
        assert file.parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_read_until_a_tensor_is_asked_for(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spooled = spool.put("a", TENSORS)
        _files(tmp_path)[0].unlink()
        assert len(spooled) == len(TENSORS)
        assert "a:bfloat16" in spooled
        assert "b:bfloat16" not in spooled
        assert list(select_lazily(spooled, [Part.B])) == ["b:last.in.the.alphabet"]
        assert num_bytes(select_lazily(spooled, [Part.A])) == 28 * 2 + 12 * 4 + 20 * 4 + 12 * 8
        with pytest.raises(KeyError):
            spooled["b:bfloat16"]
        with pytest.raises(KeyError):
            select_lazily(spooled, [Part.B])["a:bfloat16"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"last", b"lost", 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "a bit": (_flip, "damaged"),
    "another header": (_other_header, "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    act, message = DAMAGES[damage]
    with Spool(tmp_path) as spool:
        spooled = spool.put("a", {"b:last": torch.ones(3)})
        [path] = _files(tmp_path)
        act(path)
        with pytest.raises(StorageError, match=message) as caught:
            spooled["b:last"]
        assert str(path) in str(caught.value)


def test_a_file_lives_as_long_as_it_can_be_read(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        first = spool.put("a", {"a:x": torch.zeros(2), "b:x": torch.zeros(2)})
        second = spool.put("a", {"a:x": torch.ones(2)})  # in place of the first
        assert len(_files(tmp_path)) == 1
        with pytest.raises(StorageError, match="cannot be read"):
            first["a:x"]
        del first
        gc.collect()
        assert second["a:x"].equal(torch.ones(2))

        part: Mapping[str, Tensor] = select_lazily(
            spool.put("b", {"a:x": torch.ones(1), "b:x": torch.ones(1)}), [Part.B]
        )
        gc.collect()
        assert len(_files(tmp_path)) == 2, "a selection keeps the file"
        assert part["b:x"].item() == 1
        del part
        gc.collect()
        assert len(_files(tmp_path)) == 1

        spool.remove("a")
        spool.remove("never put")
        assert _files(tmp_path) == []
        left = spool.put("c", {"a:x": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot be read"):
        left["a:x"]


def test_no_folder_before_the_first_put_and_none_without_its_owner(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert list(tmp_path.iterdir()) == []
    spool.put("a", {"a:x": torch.ones(2)})
    assert len(list(tmp_path.iterdir())) == 1
    del spool
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        with largest_file(500), pytest.raises(StorageError, match="free space"):
            spool.put("a", {"a:x": torch.ones(1000)})
        assert _files(tmp_path) == []
    with pytest.raises(StorageError, match="no temporary folder"):
        Spool(tmp_path / "nowhere").put("a", {})


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    pytest.skip("needs Linux")


def test_memory_does_not_grow_with_what_is_spooled(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        tensors = {f"a:{number}": torch.full((16, 1024), float(number)) for number in range(16)}  # 1 MiB
        kept = [spool.put(str(number), tensors) for number in range(20)]
        before = _status("VmRSS")
        kept += [spool.put(str(number), tensors) for number in range(20, 200)]
        assert all(float(one["a:7"][0, 0]) == 7 for one in kept)
        assert _status("VmRSS") - before < 10e6


@dataclass(frozen=True)
class _Answering:
    """Answers with what a client starts from plus a number of its own; trains nothing."""

    clients_per_batch: int = 1

    def stack_at_most(self, clients_per_batch: int) -> None:
        pass

    def order(self, cohort: Mapping[str, Sequence[int]], done: Collection[str] = ()) -> list[str]:
        return sorted(cohort.keys() - set(done), reverse=True)

    def run_cohort(self, cohort: Iterable[ClientWork]) -> Iterator[ClientOutcome]:
        for work in cohort:
            tensors = {name: tensor + float(work.client_id) for name, tensor in work.start.items()}
            metrics = TrainMetrics(1.0, 1.0, 1.0, 1, 0, 1)
            yield ClientOutcome(work.client_id, work.round_num, 9, tensors, {}, metrics)


def _peak(num_clients: int, spool: Spool | None) -> int:
    """Most bytes above those at the start during a round of clients with 2.4 MB each."""
    sizes = {str(number): 2 for number in range(num_clients)}
    federation = tiny_federation(sizes=sizes, rank=2048, rounds=replace(ROUNDS, evaluate_every=9, num_rounds=9))
    federation = replace(federation, runner=_Answering())
    state = initial_state(federation)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _status("VmRSS")
    next(event for event in run_rounds(federation, state, spool=spool) if isinstance(event, RoundFinished))
    return _status("VmHWM") - before


@pytest.mark.filterwarnings("ignore:rank 2048 is above")
def test_peak_memory_of_a_round_does_not_grow_with_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_module, "SPOOLED_ABOVE", 2**23)
    with Spool(tmp_path) as spool:
        _peak(8, spool)  # torch's own buffers
        few, many = _peak(8, spool), _peak(72, spool)
    assert many - few < 20e6
    assert _peak(72, None) - _peak(8, None) > 100e6, "what it is without a spool"


@pytest.mark.parametrize("method", ["fedsa", "fedit", "rolora", "flora", "flexlora", "hetlora", "fedex", "local"])
def test_a_round_with_a_spool_has_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(TRAINING, optimizer="adamw", keep_optimizer_state=method != "flora")
    federation = tiny_federation(method=method, training=training, rounds=replace(ROUNDS, num_rounds=3))
    monkeypatch.setattr(round_module, "SPOOLED_ABOVE", 0)

    def run(spool: Spool | None) -> Iterator[tuple[FederationState, object, bool]]:
        spooled = []
        for event in run_rounds(federation, initial_state(federation), spool=spool):
            if isinstance(event, ClientTrained) and event.outcome is not None:
                spooled.append(isinstance(event.outcome.tensors, SpooledTensors))
            if isinstance(event, RoundFinished):
                record = {key: value for key, value in event.record.items() if not key.endswith("_seconds")}
                yield event.state, record, all(spooled)

    def bits(state: FederationState) -> object:
        kinds = {**state.personal, **{f"moments {key}": value for key, value in state.optimizer.items()}}
        clients = {key: {n: _bits(t) for n, t in tensors.items()} for key, tensors in kinds.items()}
        return clients, [{n: _bits(t) for n, t in own.items()} for own in (state.server.shared, state.server.extra)]

    with Spool(tmp_path) as spool:
        for (state, record, never), (other, same, always) in zip(run(None), run(spool), strict=True):
            assert always
            assert not never
            assert record == same
            assert bits(state) == bits(other)
