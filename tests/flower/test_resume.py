"""A server that is killed anywhere and goes on, with sites that were started again: the bytes of an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flower.federations import exchange_of, small_config, small_files
from flower.local_exchange import LocalExchange, facts
from sfedlora import RunConfig
from sfedlora.artifacts import CheckpointWriter, RunDirectory
from sfedlora.errors import ConfigError, InputError, StorageError
from sfedlora.flower import rounds
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.exchange import Lost
from sfedlora.flower.server import serve

SECONDS = {"train_seconds", "aggregate_seconds", "eval_seconds"}
OPTIONS: dict[str, Any] = {
    "local__optimizer_state": "keep",
    "rounds__server_optimizer": "fedyogi",
    "flower__metrics": "per-client",
    "rounds__num_rounds": 4,
}
"""Everything that is carried from round to round: factors, B, moments of the clients and of the server."""


class Killed(BaseException):
    """The end of a server process."""


@dataclass
class Doom:
    """Counts calls and raises at one of them; 0: never."""

    at: int
    calls: int = 0

    def strike(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Killed


@dataclass
class DoomedExchange(LocalExchange):
    """An exchange that ends the server after an answer."""

    pull_doom: Doom | None = None

    def pull(self, message_id: str) -> Envelope | Lost | None:
        answer = super().pull(message_id)
        if self.pull_doom is not None:
            self.pull_doom.strike()
        return answer


@dataclass(frozen=True)
class Undisturbed:
    path: Path
    state_dir: Path
    num_pulls: int


def _config(tmp_path: Path) -> RunConfig:
    return small_config(tmp_path, **OPTIONS)


def _exchange(config: RunConfig, tmp_path: Path, *, pull_doom: Doom | None = None) -> DoomedExchange:
    return DoomedExchange(exchange_of(config, small_files(tmp_path), tmp_path / "sites").connected, pull_doom=pull_doom)


def _serve(config: RunConfig, exchange: LocalExchange, *, resume: bool = False) -> Path:
    return serve(config, exchange, resume=resume, log=lambda _: None).path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    config, doom = _config(tmp_path), Doom(0)
    path = _serve(config, _exchange(config, tmp_path, pull_doom=doom))
    return Undisturbed(path, tmp_path / "sites", doom.calls)


def _files(path: Path, *folders: str) -> dict[str, bytes]:
    found = [file for folder in folders for file in path.glob(folder) if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SECONDS} for line in lines]


def _assert_same(tmp_path: Path, config: RunConfig, expected: Undisturbed) -> None:
    path = Path(config.output)
    shared = _files(path, "adapters/**/*", "summary.json", "checkpoints/round-*/server.safetensors")
    assert len(shared) >= 4
    assert shared == _files(expected.path, "adapters/**/*", "summary.json", "checkpoints/round-*/server.safetensors")
    personal = _files(tmp_path / "sites", "*/*/*/adapter/*")
    assert len(personal) >= 4
    assert personal == _files(expected.state_dir, "*/*/*/adapter/*")
    assert len(list(path.glob("checkpoints/round-*"))) == len(list(expected.path.glob("checkpoints/round-*")))
    last = "*/*/*/round-000004/*"
    assert _files(tmp_path / "sites", last) == _files(expected.state_dir, last) != {}
    assert _metrics(path) == _metrics(expected.path)


def _requests(exchange: LocalExchange) -> list[dict[str, Any]]:
    found = [facts(envelope) for _, way, envelope in exchange.sent if way == "down"]
    return [one for one in found if one["kind"] == "round"]


@pytest.mark.parametrize("at", [4, 7, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 6, 8, 10, 11, 12))])
def test_a_server_that_ends_after_an_answer_goes_on(at: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Two sites: pulls 1 and 2 are greetings, then two for each of four rounds, two or four for the evaluation."""
    assert undisturbed.num_pulls >= 12
    config = _config(tmp_path)
    with pytest.raises(Killed):
        _serve(config, _exchange(config, tmp_path, pull_doom=Doom(at)))
    exchange = _exchange(config, tmp_path)
    _serve(config, exchange, resume=True)
    _assert_same(tmp_path, config, undisturbed)
    for one in _requests(exchange):
        assert one["personal_round"] < one["round_num"]
        assert not one["train"] or one["personal_round"] == one["round_num"] - 1


PLACES: dict[str, tuple[type | object, str, int, bool]] = {
    "before the checkpoint of round 1": (CheckpointWriter, "save", 1, True),
    "after the checkpoint of round 1": (CheckpointWriter, "save", 1, False),
    "before the line of round 1": (RunDirectory, "append_metrics", 1, True),
    "between line and checkpoint": (RunDirectory, "append_metrics", 2, False),
    "before the checkpoint of round 3": (CheckpointWriter, "save", 3, True),
    "after the last checkpoint": (CheckpointWriter, "save", 4, False),
    "between the last checkpoint and the removal of an old one": (CheckpointWriter, "drop", 5, True),
    "after the last line": (RunDirectory, "append_metrics", 4, False),
    "before the shared adapter": (rounds, "write_served", 1, True),
    "after the shared adapter": (rounds, "write_served", 1, False),
    "before the summary": (RunDirectory, "write_summary", 1, True),
}


def _doomed(call: Callable[..., Any], doom: Doom, *, before: bool) -> Callable[..., Any]:
    def act(*args: Any, **options: Any) -> Any:
        if before:
            doom.strike()
        given = call(*args, **options)
        if not before:
            doom.strike()
        return given

    return act


QUICK = (
    "between line and checkpoint",
    "between the last checkpoint and the removal of an old one",
    "before the checkpoint of round 3",
    "before the summary",
)


@pytest.mark.parametrize("place", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in PLACES])
def test_a_server_that_ends_between_two_writes_goes_on(
    place: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, at, before = PLACES[place]
    config = _config(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, _doomed(getattr(owner, name), Doom(at), before=before))
        with pytest.raises(Killed):
            _serve(config, _exchange(config, tmp_path))
    _serve(config, _exchange(config, tmp_path), resume=True)
    _assert_same(tmp_path, config, undisturbed)


@pytest.mark.slow
def test_a_server_that_ends_in_every_round_goes_on_each_time(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config, num_ends, resume = _config(tmp_path), 0, False
    while True:
        try:
            _serve(config, _exchange(config, tmp_path, pull_doom=Doom(6)), resume=resume)
            break
        except Killed:
            num_ends, resume = num_ends + 1, True
    assert num_ends >= 4
    _assert_same(tmp_path, config, undisturbed)


def test_a_finished_run_is_left_as_it_is(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = _config(tmp_path)
    _serve(config, _exchange(config, tmp_path))
    before, lines = _files(Path(config.output), "**/*"), list[str]()
    serve(config, LocalExchange({}), resume=True, log=lines.append)
    assert _files(Path(config.output), "**/*") == before
    assert "finished already" in lines[0]
    (Path(config.output) / ".owner").write_text("{}")  # of a server that was killed right after its summary
    serve(config, LocalExchange({}), resume=True, log=lines.append)
    assert _files(Path(config.output), "**/*") == before


def test_a_server_that_ends_in_the_greeting_has_begun_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(Killed):
        _serve(config, _exchange(config, tmp_path, pull_doom=Doom(2)))
    with pytest.raises(InputError, match="no run directory"):
        _serve(config, _exchange(config, tmp_path), resume=True)
    _serve(config, _exchange(config, tmp_path))
    _assert_same(tmp_path, config, undisturbed)


def test_a_run_is_not_resumed_with_another_configuration(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(Killed):
        _serve(config, _exchange(config, tmp_path, pull_doom=Doom(6)))
    other = config.with_values({"local.learning_rate": 1.0})
    with pytest.raises(ConfigError, match="began with another configuration"):
        _serve(other, _exchange(other, tmp_path), resume=True)
    with pytest.raises(ConfigError, match="already holds another run"):
        _serve(config, _exchange(config, tmp_path))


def test_lines_that_lack_are_told_and_nothing_is_lost(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(Killed):
        _serve(config, _exchange(config, tmp_path, pull_doom=Doom(8)))
    metrics = Path(config.output, "metrics.jsonl")
    assert len(metrics.read_text().splitlines()) >= 1
    metrics.unlink()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: damaged or edited: has the rounds \[\]"):
        _serve(config, _exchange(config, tmp_path), resume=True)
    assert list(Path(config.output, "checkpoints").glob("round-*"))


def test_a_run_of_one_machine_is_not_resumed_as_a_server(tmp_path: Path) -> None:
    import sfedlora

    config = small_config(tmp_path, rounds__num_rounds=1)
    path = sfedlora.run(config).run_dir
    (path / "summary.json").unlink()
    with pytest.raises(ConfigError, match="sfedlora resume"):
        _serve(config, LocalExchange({}), resume=True)
