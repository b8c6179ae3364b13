"""A link and three nodes on loopback, with TLS and node keys, as the written app's README says.

Real processes of Flower, real certificates; the tiny model, or MiniLM. What comes out has the bytes of a run in one
process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flower.deployment import Deployment
from flower.federations import TOPICS, chat_config, chat_files, exchange_of, keys_of, secure_config, site_at
from flower.local_exchange import LocalExchange, Node, facts
from sfedlora import RunConfig, run
from sfedlora.data.corpora import hutto_rows, write_jsonl
from sfedlora.flower.certificates import write_test_certificates
from sfedlora.flower.envelope import Envelope
from sfedlora.flower.exchange import Lost
from sfedlora.flower.server import serve
from support.real_files import MINILM, hutto_archive, require_minilm

PATIENT = {"round_deadline_seconds": 400.0, "join_deadline_seconds": 400.0}
FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    patient = {f"flower__{key}": seconds for key, seconds in PATIENT.items()}
    return chat_config(tmp_path, flower__sites=list(TOPICS), **patient)


@pytest.fixture
def deployment(tmp_path: Path, config: RunConfig) -> Iterator[Deployment]:
    with Deployment.write(tmp_path / "federation", config, num_nodes=3) as started:
        started.start_link()
        yield started


def _nodes(deployment: Deployment, files: Mapping[str, Path]) -> list[dict[str, str]]:
    return [
        {"client-id": client_id, "data": str(path), "state-dir": str(deployment.root / f"state{number}")}
        for number, (client_id, path) in enumerate(files.items())
    ]


def _start_nodes(deployment: Deployment, files: Mapping[str, Path]) -> list[dict[str, str]]:
    nodes = _nodes(deployment, files)
    for number, node in enumerate(nodes):
        registered = deployment.register(number)
        assert registered.returncode == 0, registered.stdout + registered.stderr
        deployment.start_node(number, node)
    return nodes


def _metrics(deployment: Deployment) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (deployment.root / "run" / "metrics.jsonl").read_text().splitlines()]


def _differing(expected: Path, sites: Path, deployment: Deployment) -> list[str]:
    """Adapter files that are not those of a run in one process; sites: where that run's sites keep theirs."""
    pairs = [(expected / "adapters" / "shared", deployment.root / "run" / "adapters" / "shared")]
    adapters = sorted(deployment.root.glob("state*/*/*/adapter"))
    assert len(adapters) == 3
    for own in adapters:
        federation_id, client_id = own.parts[-3:-1]
        theirs = sites / client_id
        pairs.append((theirs if sites.name == "clients" else theirs / federation_id / client_id / "adapter", own))
    return [str(b / name) for a, b in pairs for name in FILES if (a / name).read_bytes() != (b / name).read_bytes()]


@pytest.mark.slow
def test_three_sites_over_tls_give_the_bytes_of_the_serial_runner_also_if_the_server_is_killed(
    tmp_path: Path, config: RunConfig, deployment: Deployment
) -> None:
    files = chat_files(tmp_path)
    _start_nodes(deployment, files)
    first = deployment.submit()
    deployment.wait_for_file("checkpoints/round-000001", seconds=900)
    deployment.kill_server_app()
    assert deployment.wait_for_end(first, seconds=120).startswith("finished:failed")
    assert not (deployment.root / "run" / "summary.json").exists()
    deployment.submit(resume="true")
    deployment.wait_for_file("summary.json", seconds=900)

    local = run(config).run_dir
    assert _differing(local, local / "adapters" / "clients", deployment) == []
    assert [line["excluded"] for line in _metrics(deployment)] == [{}, {}, {}]
    trainers = [path.read_text().count("trainer of site") for path in deployment.root.glob("state*/trainer.log")]
    assert trainers == [1, 1, 1]  # the base model is loaded once per site, over both runs of the server


def test_hostile_nodes_are_refused_and_a_killed_node_and_a_killed_server_go_on(
    tmp_path: Path, config: RunConfig, deployment: Deployment
) -> None:
    files = chat_files(tmp_path)
    # hostile nodes first: the link must refuse them, and the federation must go on as if they were not there
    node, other = _nodes(deployment, files)[0], tmp_path / "other-certificates"
    write_test_certificates(other, num_nodes=1)
    wrong_authority = deployment.start_node(7, node, certificate=other / "ca.crt", key=other / "node0.key")
    no_key = deployment.start_node(8, node, key=other / "node0.key")
    no_certificate = deployment.start_node(9, node, secure=False)
    _survives(tmp_path, config, files, deployment)
    assert "SuperNode ID" in deployment.log("node0")  # what a node prints once the link has taken it
    for name in (wrong_authority, no_key, no_certificate):
        assert "Starting Flower SuperNode" in deployment.log(name)
        assert "SuperNode ID" not in deployment.log(name)


def _survives(tmp_path: Path, config: RunConfig, files: Mapping[str, Path], deployment: Deployment) -> None:
    """Three rounds; the third site's node is killed in the second one, the server in the last."""
    nodes = _start_nodes(deployment, files)
    first = deployment.submit()
    deployment.wait_for_file("checkpoints/round-000001", seconds=900)
    deployment.stop("node2", kill=True)
    deployment.wait_for_file("checkpoints/round-000002", seconds=600)
    deployment.kill_server_app()
    assert deployment.wait_for_end(first, seconds=300).startswith("finished:failed")
    deployment.restart_node(2, nodes[2], seconds=600)
    deployment.submit(resume="true")
    deployment.wait_for_file("summary.json", seconds=900)
    assert [list(line["excluded"]) for line in _metrics(deployment)] == [[], [list(files)[2]], []]

    # the same in one process, where the third site is silent in round 2
    exchange = exchange_of(config, files, tmp_path / "sites")
    exchange.connected[3] = _silent_in(exchange.connected[3], [2])
    config = config.with_values({"output": str(tmp_path / "expected")})
    served = serve(config, exchange, resume=False, log=lambda _: None)
    assert _differing(served.path, tmp_path / "sites", deployment) == []


@pytest.mark.slow
def test_a_killed_node_and_a_killed_server_go_on_with_minilm_and_real_sentences(tmp_path: Path) -> None:
    require_minilm()
    rows = hutto_rows(hutto_archive())
    files = {}
    for domain in ("movies", "products", "tweets"):
        files[domain] = tmp_path / f"{domain}.jsonl"
        own = [row for row in rows if row["domain"] == domain]
        write_jsonl(own[:: len(own) // 120][:120], files[domain])
    config = RunConfig.from_mapping(
        {
            "model": {"source": MINILM, "task": "sequence-classification", "dtype": "float32"},
            "data": {"source": str(files["movies"]), "max_length": 48, "labels": ["negative", "positive"]},
            "partition": {"scheme": "iid", "num_clients": 3},
            "lora": {"rank": 8},
            "rounds": {"num_rounds": 3},
            "local": {"learning_rate": 2e-3, "local_steps": 5, "batch_size": 8},
            "flower": {"federation_id": "minilm", "sites": sorted(files), **PATIENT},
            "threads": 1,
            "output": str(tmp_path / "run"),
        }
    )
    with Deployment.write(tmp_path / "federation", config, num_nodes=3) as deployment:
        deployment.start_link()
        _survives(tmp_path, config, files, deployment)
    summary = json.loads((deployment.root / "run" / "summary.json").read_text())
    lost, kept = (summary[when]["test"]["weighted"]["eval_loss"] for when in ("initial", "last"))
    assert kept < lost - 0.02, "nothing was learned"


@pytest.mark.slow
def test_secure_sums_over_tls_have_the_bytes_of_those_in_one_process(tmp_path: Path) -> None:
    config = secure_config(tmp_path, **{f"flower__{key}": seconds for key, seconds in PATIENT.items()})
    files, keys = chat_files(tmp_path), keys_of(tmp_path / "keys")
    with Deployment.write(tmp_path / "federation", config, num_nodes=3) as deployment:
        deployment.start_link()
        for number, node in enumerate(_nodes(deployment, files)):
            deployment.register(number)
            deployment.start_node(number, node | keys[node["client-id"]])
        deployment.submit()
        deployment.wait_for_file("summary.json", seconds=900)

    sites = tmp_path / "sites"  # with keys of their own: the masks differ, the sums do not
    other = keys_of(tmp_path / "other-keys")
    exchange = LocalExchange(
        {
            number: site_at(config, client_id, path, sites / client_id, other[client_id]).answer
            for number, (client_id, path) in enumerate(files.items(), start=1)
        }
    )
    served = serve(config, exchange, resume=False, log=lambda _: None)
    assert _differing(served.path, sites, deployment) == []


def _silent_in(node: Node, rounds: list[int]) -> Node:
    def answer(envelope: Envelope) -> Envelope | Lost | None:
        asked = facts(envelope)
        return Lost("killed") if asked.get("train") and asked["round_num"] in rounds else node(envelope)

    return answer
