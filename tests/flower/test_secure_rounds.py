"""Rounds of which the server learns the sum of the sites' changes alone: real sites and keys in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from flower.federations import LIMIT, TOPICS, chat_files, keys_of, secure_config, site_at
from flower.local_exchange import Answer, LocalExchange, Node, facts
from sfedlora import RunConfig
from sfedlora.errors import ConfigError, RunError
from sfedlora.federation.spool import Spool
from sfedlora.flower import rounds as rounds_module
from sfedlora.flower.envelope import Envelope, failure
from sfedlora.flower.exchange import Lost
from sfedlora.flower.secure_keys import write_private_key
from sfedlora.flower.server import serve
from sfedlora.flower.settings import site_settings
from sfedlora.storage import read_tensors

SECOND = TOPICS[1]
"""The client of node 2."""
SHARED = Path("adapters", "shared", "adapter_model.safetensors")


def plain(config: RunConfig, output: Path) -> RunConfig:
    """The same without secure sums."""
    return config.with_values({"flower.secure_sum": False, "flower.secure_limit": None, "output": str(output)})


def sites_of(config: RunConfig, tmp_path: Path, name: str = "sites") -> LocalExchange:
    """A real site with keys per topic, as nodes 1, 2, 3."""
    folder = tmp_path / name
    folder.mkdir()
    files, keys = chat_files(tmp_path), keys_of(folder / "keys")
    for path in files.values():
        path.write_text("\n".join(path.read_text().splitlines()[: 20 + 4 * len(path.stem)]) + "\n")
    return LocalExchange(
        {
            number: site_at(config, client_id, path, folder / client_id, keys[client_id]).answer
            for number, (client_id, path) in enumerate(files.items(), start=1)
        }
    )


def served(config: RunConfig, exchange: LocalExchange, *, resume: bool = False) -> Path:
    return serve(config, exchange, resume=resume, log=lambda _: None).path


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def round_of(envelope: Envelope) -> int:
    """The round of a training request; 0 for other messages."""
    given = facts(envelope)
    return int(str(given["round_num"])) if given.get("train") else 0


def trained(exchange: LocalExchange, node: int) -> list[tuple[Envelope, Envelope]]:
    """The training requests to a node and what it answered."""
    own = [(way, envelope) for to, way, envelope in exchange.sent if to == node]
    return [(ask, answer) for (_, ask), (way, answer) in pairwise(own) if round_of(ask) and way == "up"]


def numbers(envelope: Envelope) -> NDArray[np.uint32]:
    assert envelope.dtype == "uint32"
    return np.frombuffer(envelope.data, "<u4")


def shared_of(path: Path) -> NDArray[np.float64]:
    factors = read_tensors(path / SHARED)
    return np.concatenate([factors[name].double().numpy().ravel() for name in sorted(factors)])


def on(round_num: int, trick: Callable[[Envelope], Answer], honest: Node) -> Node:
    """A node that plays a trick in one round."""
    return lambda envelope: trick(envelope) if round_of(envelope) == round_num else honest(envelope)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LocalExchange, RunConfig]:
    """A secure run of two rounds, weighted by examples."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    config = secure_config(tmp_path)
    exchange = sites_of(config, tmp_path)
    return served(config, exchange), exchange, config


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LocalExchange]:
    """The same run without secure sums."""
    tmp_path = tmp_path_factory.mktemp("without")
    config = plain(secure_config(tmp_path), tmp_path / "run")
    exchange = sites_of(config, tmp_path)
    return served(config, exchange), exchange


METHODS: dict[str, dict[str, Any]] = {
    "by examples": {},
    "uniform": {"rounds__weighting": "uniform"},
    "both factors": {"method__name": "fedit", "lora__scaling": "lora"},
    "alternating factors": {"method__name": "rolora", "lora__scaling": "lora", "lora__init": "shared"},
    "own A": {"lora__init": "local", "flower__secure_limit": 4.0},
    "momentum": {"rounds__server_optimizer": "fedavgm"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_secure_run_is_the_plain_one_to_the_stated_exactness(name: str, tmp_path: Path) -> None:
    config = secure_config(tmp_path, **{"rounds__num_rounds": 1, **METHODS[name]})
    without = plain(config, tmp_path / "plain")
    found, expected = (
        shared_of(served(config, sites_of(config, tmp_path))),
        shared_of(served(without, sites_of(without, tmp_path, "plain-sites"))),
    )
    limit, rounding = config.flower.secure_limit or 0.0, 4 * float(np.spacing(np.float32(np.abs(expected).max())))
    assert np.abs(found - expected).max() <= 9 * limit / 2**32 + rounding


def test_a_round_says_that_it_was_secure_and_the_rest_is_as_ever(
    undisturbed: tuple[Path, LocalExchange, RunConfig], without: tuple[Path, LocalExchange]
) -> None:
    for found, one in zip(metrics(undisturbed[0]), metrics(without[0]), strict=True):
        assert found.keys() - one.keys() == {"secure_sum"}
        assert found["secure_sum"] is True
        assert one.keys() <= found.keys()
        for key in ("cohort", "excluded", "bytes_up", "bytes_down", "tokens", "effective_cohort_size", "scaling"):
            assert found[key] == one[key]
        assert found["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert found["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)


def test_what_a_site_sends_is_noise_that_says_nothing_of_its_change(
    undisturbed: tuple[Path, LocalExchange, RunConfig], without: tuple[Path, LocalExchange]
) -> None:
    exchange, open_exchange = undisturbed[1], without[1]
    for node in (1, 2, 3):
        message = numbers(trained(exchange, node)[0][1])
        ask, answer = trained(open_exchange, node)[0]
        before, after = (np.frombuffer(one.data, "<f4").astype(float) for one in (ask, answer))
        change = after - before
        assert len(message) == len(change)
        counts = np.bincount(np.frombuffer(message.tobytes(), np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
        assert stats.kstest(message / 2.0**32, "uniform").pvalue > 1e-4
        signed = message.view(np.int32).astype(float)
        assert np.abs(change).max() > 0
        assert abs(np.corrcoef(signed, change)[0, 1]) < 5 / np.sqrt(len(change))
        assert abs(np.corrcoef(np.abs(signed), np.abs(change))[0, 1]) < 5 / np.sqrt(len(change))


def test_masks_cancel_in_the_sum_and_in_no_part_of_it(undisturbed: tuple[Path, LocalExchange, RunConfig]) -> None:
    _, exchange, config = undisturbed
    messages = [numbers(trained(exchange, node)[0][1]) for node in (1, 2, 3)]
    step = 3 * LIMIT / (2**31 - 4)
    whole = (messages[0] + messages[1] + messages[2]).view(np.int32) * step
    assert 0 < np.abs(whole).max() < LIMIT / 2
    for one, other in ((0, 1), (0, 2), (1, 2)):
        part = (messages[one] + messages[other]).view(np.int32) * step
        assert np.abs(part).max() > 0.99 * 3 * LIMIT
    assert config.flower.secure_limit == LIMIT


def test_the_servers_step_never_sees_a_single_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*_: object) -> None:
        raise AssertionError("a single update came to the server's step")

    for name in ("server_step_with_record", "accept_updates"):
        monkeypatch.setattr(rounds_module, name, seen)
    monkeypatch.setattr(Spool, "put", seen)
    config = secure_config(tmp_path, rounds__num_rounds=1)
    assert metrics(served(config, sites_of(config, tmp_path)))[0]["excluded"] == {}


def _sent(answer: Answer) -> Envelope:
    assert isinstance(answer, Envelope)
    return answer


VOID: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "failed": (lambda _: failure("training"), "failed with code 'training'"),
    "lost": (lambda _: Lost("the node did not answer"), "the node did not answer"),
    "other numbers": (lambda answer: replace(_sent(answer), dtype="float32"), "factors in float32; asked for"),
    "too short": (lambda answer: replace(_sent(answer), data=_sent(answer).data[4:]), "the layout needs"),
    "another order": (
        lambda answer: edited(_sent(answer), lambda values: values["layout"].reverse()),
        "the layout has another order",
    ),
}


@pytest.mark.parametrize("name", VOID)
def test_a_missing_message_voids_the_round_which_is_repeated_bit_for_bit(
    name: str, undisturbed: tuple[Path, LocalExchange, RunConfig], tmp_path: Path
) -> None:
    expected, _, _ = undisturbed
    trick, reason = VOID[name]
    config = secure_config(tmp_path)
    exchange = sites_of(config, tmp_path)
    honest = exchange.connected[2]
    exchange.connected[2] = on(2, lambda envelope: trick(honest(envelope)), honest)
    with pytest.raises(RunError, match=rf"round 2 is void: .* all 3 sites \({SECOND}: .*{reason}.*resume=true"):
        served(config, exchange)
    sent_before = {node: trained(exchange, node)[-1][1].data for node in (1, 3)}
    exchange.connected[2] = honest
    path = served(config, exchange, resume=True)
    assert {node: trained(exchange, node)[-1][1].data for node in (1, 3)} == sent_before
    assert [record["excluded"] for record in metrics(path)] == [{}, {}]
    assert (path / SHARED).read_bytes() == (expected / SHARED).read_bytes()


def test_a_round_begins_only_when_all_sites_are_there(tmp_path: Path) -> None:
    config = secure_config(tmp_path, flower__join_deadline_seconds=0.3)
    exchange = sites_of(config, tmp_path)
    del exchange.connected[2]
    with pytest.raises(RunError, match="2 sites reported"):
        served(config, exchange)
    assert not any(round_of(envelope) for _, way, envelope in exchange.sent if way == "down")


def test_a_site_that_lost_its_state_goes_on_from_b_0_in_the_same_round(tmp_path: Path) -> None:
    config = secure_config(tmp_path)
    exchange = sites_of(config, tmp_path)
    honest = exchange.connected[2]

    def losing(envelope: Envelope) -> Answer:
        if facts(envelope)["personal_round"] == 1:
            shutil.rmtree(tmp_path / "sites" / SECOND)
        return honest(envelope)

    exchange.connected[2] = on(2, losing, honest)
    assert [record["excluded"] for record in metrics(served(config, exchange))] == [{}, {}]
    asked = [facts(ask)["personal_round"] for ask, _ in trained(exchange, 2)]
    assert asked == [0, 1, 0]


def edited(envelope: Envelope, change: Callable[[dict[str, Any]], None]) -> Envelope:
    values: dict[str, Any] = json.loads(envelope.facts)
    change(values)
    return replace(envelope, facts=json.dumps(values))


def _other_factors(envelope: Envelope) -> Envelope:
    content = np.frombuffer(envelope.data, "<f4").copy()
    content[0] += 1.0
    return replace(envelope, data=content.tobytes())


def _secure(**changed: Any) -> Callable[[Envelope], Envelope]:
    return lambda envelope: edited(envelope, lambda one: one["secure"].update(changed))


REFUSED: dict[str, tuple[Callable[[Envelope], Envelope], str]] = {
    "no secure sum": (lambda one: edited(one, lambda v: v.update(secure=None, wire_dtype="float32")), "if and only if"),
    "plain numbers": (lambda one: edited(one, lambda v: v.update(wire_dtype="float32")), "in float32; expected uint32"),
    "two sites": (_secure(cohort=[SECOND, "ai"]), "over 2 sites; expected at least 3"),
    "a site twice": (_secure(cohort=[SECOND, "ai", "ai"]), "over 3 sites"),
    "without this site": (_secure(cohort=["ai", "emotion-1", "x"]), "with this one"),
    "an unknown site": (_secure(cohort=[*TOPICS, "mallory"]), "a secure sum with mallory"),
    "all the weight": (_secure(num_examples=1), "a cohort of 1 examples"),
    "no weight": (_secure(num_examples=None), "if and only if rounds.weighting"),
    "an older B": (lambda one: edited(one, lambda v: v.update(personal_round=0)), "the newest here is of 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_site_refuses_what_no_honest_server_asks_for(
    name: str, undisturbed: tuple[Path, LocalExchange, RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    _, exchange, _ = undisturbed
    trick, reason = REFUSED[name]
    request = trained(exchange, 2)[1][0]
    answer = exchange.connected[2](trick(request))
    assert answer == failure("message")
    assert reason in caplog.text


AGAIN: dict[str, tuple[Callable[[Envelope], Envelope], str]] = {
    "another cohort": (_secure(cohort=[*TOPICS[:2], "fourth"]), "another cohort"),
    "other factors": (_other_factors, "asked again with other factors"),
    "other examples": (_secure(num_examples=10_000), "asked again with other factors, sizes or examples"),
    "another gamma": (lambda one: edited(one, lambda v: v.update(scaling=1e-6)), "asked again with other factors"),
}


def test_a_site_answers_a_round_once_and_the_same_question_with_the_same_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = secure_config(tmp_path, rounds__num_rounds=1)
    exchange = sites_of(config, tmp_path)
    keys = tmp_path / "sites" / "keys"
    known = json.loads((keys / "public.json").read_text())
    (keys / "public.json").write_text(json.dumps({**known, "fourth": write_private_key(keys / "fourth.key")}))
    given = {"secure-key": str(keys / f"{SECOND}.key"), "secure-public-keys": str(keys / "public.json")}
    site = site_at(config, SECOND, tmp_path / f"{SECOND}.jsonl", tmp_path / "sites" / SECOND, given)
    exchange.connected[2] = site.answer
    served(config, exchange)
    request, answer = trained(exchange, 2)[0]
    for is_lost in (False, True):
        if is_lost:
            shutil.rmtree(tmp_path / "sites" / SECOND)  # the record lies beside the key
        for trick, reason in AGAIN.values():
            caplog.clear()
            assert site.answer(trick(request)) == failure("message")
            assert reason in caplog.text
        assert site.answer(request).data == answer.data


def test_another_change_under_the_same_masks_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = secure_config(tmp_path, rounds__num_rounds=1)
    exchange = sites_of(config, tmp_path)
    served(config, exchange)
    request, _ = trained(exchange, 2)[0]
    rows = (tmp_path / f"{SECOND}.jsonl").read_text().splitlines()
    (tmp_path / f"{SECOND}.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    keys = tmp_path / "sites" / "keys"
    given = {"secure-key": str(keys / f"{SECOND}.key"), "secure-public-keys": str(keys / "public.json")}
    site = site_at(config, SECOND, tmp_path / f"{SECOND}.jsonl", tmp_path / "sites" / SECOND, given)
    assert site.answer(request) == failure("message")
    assert "the change is another one than that sent before" in caplog.text


def test_sites_that_are_told_different_things_leave_the_server_with_noise(tmp_path: Path) -> None:
    config = secure_config(tmp_path, rounds__num_rounds=1)
    exchange = sites_of(config, tmp_path)
    honest = exchange.connected[2]
    exchange.connected[2] = on(1, lambda envelope: honest(_other_factors(envelope)), honest)
    served(config, exchange)
    messages = [numbers(trained(exchange, node)[0][1]) for node in (1, 2, 3)]
    whole = messages[0] + messages[1] + messages[2]
    assert stats.kstest(whole / 2.0**32, "uniform").pvalue > 1e-4


def test_a_change_beyond_the_limit_is_not_sent_and_the_round_is_void(tmp_path: Path) -> None:
    config = secure_config(tmp_path, flower__secure_limit=1e-9)
    exchange = sites_of(config, tmp_path)
    with pytest.raises(RunError, match=r"round 1 is void: .*failed with code 'limit'"):
        served(config, exchange)
    assert not [envelope for _, way, envelope in exchange.sent if way == "up" and envelope.data]


def test_it_goes_with_local_privacy(tmp_path: Path) -> None:
    config = secure_config(
        tmp_path,
        rounds__num_rounds=1,
        rounds__weighting="uniform",
        privacy__mode="local",
        privacy__clip_norm=0.01,
        privacy__noise_multiplier=1.0,
    )
    record = metrics(served(config, sites_of(config, tmp_path)))[0]
    assert record["secure_sum"] is True
    assert record["privacy"]["mode"] == "local"


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no limit": ({"flower__secure_limit": None}, "needs flower.secure_limit"),
    "a limit alone": ({"flower__secure_sum": False}, "secure_limit: 0.05 is not used without secure_sum"),
    "no sites": ({"flower__sites": None}, "needs flower.sites"),
    "two sites": ({"flower__sites": list(TOPICS[:2]), "flower__min_replies": 2}, "at least 3 sites in a round"),
    "a cohort of two": ({"rounds__cohort_size": 2, "flower__min_replies": 2}, "at least 3 sites in a round"),
    "two replies": ({"flower__min_replies": 2}, "flower.min_replies: 2, but .* all 3 sites .* give 3"),
    "half the bytes": ({"flower__wire_dtype": "bfloat16"}, "use wire_dtype: float32"),
    "flora": ({"method__name": "flora", "lora__scaling": "lora"}, "the server step of method 'flora' needs"),
    "local": ({"method__name": "local", "lora__scaling": "rslora", "lora__init": "shared"}, "'local' sends nothing"),
    "median": ({"robust": "median"}, "which robust: median needs"),
    "central privacy": (
        {
            "rounds__weighting": "uniform",
            "privacy__mode": "central",
            "privacy__clip_norm": 1.0,
            "privacy__noise_multiplier": 1.0,
        },
        "use privacy.mode: local",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be_secure_are_refused(name: str, tmp_path: Path) -> None:
    overrides, message = CONFIGS[name]
    with pytest.raises(ConfigError, match=message):
        secure_config(tmp_path, **overrides)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    values = json.loads(json.dumps(secure_config(tmp_path).model_dump(mode="json")))
    values["lora"]["rank"] = [2, 4, 3]
    with pytest.raises(ConfigError, match=r"flower\.secure_sum: true .* needs one rank"):
        RunConfig.from_mapping(values)


def _without(text: str, site: str) -> str:
    return json.dumps({name: key for name, key in json.loads(text).items() if name != site})


BAD_KEYS: dict[str, tuple[Callable[[Path], None], str]] = {
    "readable by others": (lambda one: (one / "ai.key").chmod(0o640), "permissions 640, .*chmod 600"),
    "no private key": (lambda one: (one / "ai.key").unlink(), "ai.key cannot be read"),
    "half a key": (lambda one: _rewrite(one / "ai.key", lambda text: text[:40]), "is no key; expected 64"),
    "binary": (lambda one: _bytes(one / "ai.key"), "cannot be read .not text"),
    "public keys that others can write": (lambda one: (one / "public.json").chmod(0o666), "permissions 666, .*go-w"),
    "no JSON": (lambda one: _rewrite(one / "public.json", lambda text: text[1:]), "is no JSON object"),
    "an unknown site": (
        lambda one: _rewrite(one / "public.json", lambda t: _without(t, SECOND)),
        f"no key of {SECOND}",
    ),
    "not its own": (
        lambda one: _rewrite(one / "public.json", lambda t: json.dumps({**json.loads(t), "ai": "ab" * 32})),
        "the key of 'ai' is not that of secure-key",
    ),
    "one key twice": (
        lambda one: _rewrite(one / "public.json", lambda t: json.dumps({**json.loads(t), "x": json.loads(t)[SECOND]})),
        "has one key twice",
    ),
    "a number": (
        lambda one: _rewrite(one / "public.json", lambda t: json.dumps({**json.loads(t), "x": 5})),
        "key of 'x' is no key",
    ),
}


def _rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def _bytes(path: Path) -> None:
    path.write_bytes(b"\xff" * 32)


@pytest.mark.parametrize("name", BAD_KEYS)
def test_keys_that_cannot_be_used_are_refused(name: str, tmp_path: Path) -> None:
    spoil, message = BAD_KEYS[name]
    keys = keys_of(tmp_path / "keys")["ai"]
    node = {"client-id": "ai", "data": "/d", "state-dir": "/s", **keys}
    config = secure_config(tmp_path)
    settings = site_settings(config, node)
    assert settings.keys is not None
    assert (tmp_path / "keys" / "ai.key").read_text().strip() not in repr(settings)
    assert repr(settings.keys.private_key)[2:20] not in repr(settings)
    spoil(tmp_path / "keys")
    with pytest.raises(ConfigError, match=message):
        site_settings(config, node)


@pytest.mark.parametrize("key", ["secure-key", "secure-public-keys"])
def test_a_site_without_keys_is_refused_where_they_are_needed(key: str, tmp_path: Path) -> None:
    keys = keys_of(tmp_path / "keys")["ai"]
    del keys[key]
    config = secure_config(tmp_path)
    node = {"client-id": "ai", "data": "/d", "state-dir": "/s", **keys}
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        site_settings(config, node)
    assert site_settings(plain(config, tmp_path / "p"), node).keys is None


def test_a_simulation_says_that_its_clients_have_no_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no keys; simulate with .*flower\.secure_sum=false"):
        site_settings(secure_config(tmp_path), {"num-partitions": 3, "partition-id": 0})


def test_the_command_writes_a_key_for_its_owner_once(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sfedlora.cli.app import app

    path = tmp_path / "site.key"
    done = CliRunner().invoke(app, ["flower", "secure-key", str(path)])
    assert done.exit_code == 0
    assert len(bytes.fromhex(done.output.strip())) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    again = CliRunner().invoke(app, ["flower", "secure-key", str(path)])
    assert again.exit_code != 0
    assert path.read_bytes() == content
    assert content.decode().strip() not in done.output
