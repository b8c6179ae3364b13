"""What is shipped: metadata that agrees with itself, the tiny model and its data, the archive, the pinned extras."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "src" / "sfedlora" / "assets"
EXTRAS = ("flower", "ray", "gguf", "report", "privacy", "trackers", "quantization", "dev", "fuzz", "docs")


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return content


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def chat_rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / "tiny_chat.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    metadata, pinned = project(), pins()
    extras = metadata["optional-dependencies"]
    assert set(extras) == set(EXTRAS)
    requirements = [Requirement(text) for text in [*metadata["dependencies"], *(r for e in EXTRAS for r in extras[e])]]
    third_party = [requirement for requirement in requirements if requirement.name != "sfedlora"]
    for requirement in third_party:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_constraints_are_plain_and_pin_the_torch_that_make_asks_for() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in text.splitlines())
    assert f"torch=={pins()['torch']}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_tiny_model_loads_and_knows_more_than_a_uniform_guess() -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_llama")
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 164_160
    text = "how are you doing today?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 0.6 * torch.log(torch.tensor(1024.0))


def test_the_chat_template_of_a_prompt_begins_that_of_the_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_llama")
    row = chat_rows()[0]
    prompt = [{"role": "user", "content": row["prompt"]}]
    whole = [*prompt, {"role": "assistant", "content": row["response"]}]
    begin = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(whole, tokenize=False)
    assert begin == f"<s><|user|>{row['prompt']}</s><|assistant|>"
    assert full == f"{begin}{row['response']}</s>"
    first, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (begin, full))
    assert both[: len(first)] == first
    assert both[-1] == tokenizer.eos_token_id


def test_the_tiny_chat_has_eight_equal_clients_of_distinct_pairs() -> None:
    rows = chat_rows()
    assert Counter(row["topic"] for row in rows) == dict.fromkeys(
        ("ai", "conversations", "emotion-1", "emotion-2", "emotion-3", "psychology", "trivia-1", "trivia-2"), 60
    )
    assert len({(row["prompt"], row["response"]) for row in rows}) == len(rows)
    assert all(set(row) == {"prompt", "response", "topic"} and all(row.values()) for row in rows)


@pytest.mark.slow
def test_the_wheel_holds_the_assets_and_the_licences(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"sfedlora/assets/{path.relative_to(ASSETS)}" for path in ASSETS.rglob("*") if path.is_file()}
    assert shipped | {"sfedlora/py.typed"} <= names
    assert {name.rsplit("/", 1)[-1] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_all_extras_install_together_with_the_constraints(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*install, f"torch=={pins()['torch']}", f"{ROOT}[{','.join(EXTRAS)}]"], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    installed = {canonicalize_name(item["name"]): item["version"].split("+")[0] for item in json.loads(listed.stdout)}
    pinned = pins()
    assert set(installed) - set(pinned) <= {"pip", "setuptools", "sfedlora"}
    assert [name for name in installed if name in pinned and installed[name] != pinned[name]] == []
