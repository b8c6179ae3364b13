"""Configurations: YAML 1.2 scalars, presets, overrides, round trips through files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfedlora.config import PRESETS, RunConfig, apply_overrides
from sfedlora.config.sections import MethodSection, Section
from sfedlora.config.yaml_file import dump_yaml, parse_scalar, read_yaml, split_values
from sfedlora.errors import ConfigError
from sfedlora.methods import METHODS
from support.command_line import write_config

LEAST: dict[str, Any] = {
    "model": {"source": "m"},
    "data": {"source": "d"},
    "partition": {"scheme": "iid", "num_clients": 4},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-0.5", -0.5),
        ("010", 10),
        ("+3", 3),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-11-22", "2026-11-22"),
        ("'8'", "8"),
        ("[1, a]", [1, "a"]),
        ("{a: 1e-2}", {"a": 0.01}),
        (".inf", math.inf),
        ("a=b", "a=b"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_the_file_and_an_override_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in ("1e-3", "010", "no", "'8'", "[1, a]"):
        path.write_text(f"key: {text}\n", encoding="utf-8")
        assert read_yaml(path).values["key"] == parse_scalar(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), plain, min_size=1, max_size=4))
def test_what_is_written_reads_back_equal(values: dict[str, Any]) -> None:
    assert parse_scalar(dump_yaml(values)) == values


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_configuration_reads_back_equal(preset: str | None, tmp_path: Path) -> None:
    config = RunConfig.from_mapping({**LEAST, "preset": preset, "local": {"learning_rate": 1e-5, "local_epochs": 2}})
    (tmp_path / "config.yaml").write_text(config.dump(), encoding="utf-8")
    assert RunConfig.load(tmp_path / "config.yaml") == config


def test_explicit_keys_win_over_a_preset() -> None:
    config = RunConfig.from_mapping({**LEAST, "preset": "fedit", "lora": {"scaling": "rslora"}})
    assert (config.method.name, config.lora.scaling, config.lora.init) == ("fedit", "rslora", "shared")
    with pytest.raises(ConfigError, match=r"lora: .*dictionary"):
        RunConfig.from_mapping({**LEAST, "preset": "fedit", "lora": 3})
    assert RunConfig.from_mapping({**LEAST, "preset": "fedit", "lora": None} | {"lora": {}}).lora.scaling == "lora"


def test_only_presets_of_the_paper_draw_independently() -> None:
    independent = {name for name, content in PRESETS.items() if content["lora"]["init"] == "independent"}
    assert independent == {"sfed-lora", "fedsa-lora-independent", "fedsa-rslora-independent"}


def test_the_methods_of_the_configuration_are_those_that_exist() -> None:
    described = MethodSection.model_fields["name"].description or ""
    assert all(name in described for name in METHODS)
    assert {content["method"]["name"] for content in PRESETS.values()} <= set(METHODS)


def test_overrides_apply_in_order_and_leave_the_original() -> None:
    values = {"lora": {"rank": 4}, "seed": 1}
    result = apply_overrides(values, ["lora.rank=8", "lora.rank=16", "local.learning_rate=1e-3", "data={source: a=b}"])
    assert result == {
        "lora": {"rank": 16},
        "seed": 1,
        "local": {"learning_rate": 0.001},
        "data": {"source": "a=b"},
    }
    assert values == {"lora": {"rank": 4}, "seed": 1}


def test_epochs_replace_the_default_number_of_steps() -> None:
    local = RunConfig.from_mapping({**LEAST, "local": {"local_epochs": 1}}).local
    assert (local.local_steps, local.local_epochs) == (None, 1)


def test_a_configuration_cannot_be_changed() -> None:
    config = RunConfig.from_mapping(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        config.lora.rank = 3


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({"scheme": "column"}, "needs partition.column"),
        ({"scheme": "iid", "num_clients": 3, "column": "x"}, "does not use column"),
        ({"scheme": "shards", "num_clients": 3, "concentration": 1.0}, "does not use concentration"),
        ({"scheme": "quantity"}, "needs partition.num_clients"),
        ({"scheme": "dirichlet", "num_clients": 0}, "greater than 0"),
    ],
)
def test_keys_that_a_scheme_does_not_use(partition: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({**LEAST, "partition": partition})


def test_every_key_is_documented() -> None:
    documented = 0
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            assert section.__doc__, name
            for key, inner in section.model_fields.items():
                assert inner.description, f"{name}.{key}"
                documented += 1
        else:
            assert field.description, name
    assert documented > 40


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8,64", ["8", "64"]),
        ("8", ["8"]),
        (" a , b ", ["a", "b"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("{a: 1, b: 2},3", ["{a: 1, b: 2}", "3"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("", [""]),
        ("8,", ["8", ""]),
    ],
)
def test_values_are_split_at_commas_outside_brackets(text: str, values: list[str]) -> None:
    assert split_values(text) == values


# Ranks


def with_rank(rank: object, **sections: dict[str, Any]) -> RunConfig:
    lora = {"rank": rank, **sections.pop("lora", {})}
    return RunConfig.from_mapping({**LEAST, "lora": lora, **sections})


@pytest.mark.parametrize("method", METHODS)
def test_a_list_of_ranks_is_for_methods_that_can(method: str) -> None:
    scaling = {"scaling": "lora"}
    different, equal = [4, 8, 2, 4], [4, 4, 4, 4]
    assert with_rank(equal, method={"name": method}, lora=scaling).lora.rank == (4, 4, 4, 4)
    if method in {"fedsa", "flora", "flexlora", "hetlora", "local"}:
        assert with_rank(different, method={"name": method}, lora=scaling).lora.rank == (4, 8, 2, 4)
        return
    words = (
        rf"lora\.rank: method '{method}' needs one rank for all clients, got \[4, 8, 2, 4\]; give one number, or use "
        "one of fedsa, flora, flexlora, hetlora, local"
    )
    with pytest.raises(ConfigError, match=words):
        with_rank(different, method={"name": method}, lora=scaling)


def test_a_list_of_ranks_reads_back_from_files_and_overrides(tmp_path: Path) -> None:
    config = with_rank([4, 8, 2, 4])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    assert RunConfig.load(path) == config
    assert RunConfig.load(path, ["lora.rank=[1, 2, 3, 4]"]).lora.rank == (1, 2, 3, 4)
    assert RunConfig.load(path, ["lora.rank=8"]).lora.rank == 8
    drawn = RunConfig.load(path, ["lora.rank=[2, 16]", "lora.rank_assignment=drawn"])
    assert (drawn.lora.rank, drawn.lora.rank_assignment) == ((2, 16), "drawn")


def test_a_listed_rank_is_one_for_each_client() -> None:
    for rank in ([4, 8], [4, 8, 2, 4, 4]):
        words = rf"lora\.rank: {len(rank)} ranks for 4 clients \(partition.num_clients\); .*rank_assignment: drawn"
        with pytest.raises(ConfigError, match=words):
            with_rank(rank)
        assert with_rank(rank, lora={"rank_assignment": "drawn"}).lora.rank == tuple(rank)
    by_column = {"scheme": "column", "column": "site"}  # the clients are counted when the data are read
    assert with_rank([4, 8, 2], partition=by_column).lora.rank == (4, 8, 2)


def test_a_draw_needs_ranks_to_draw_from() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank_assignment: drawn needs a list in lora\.rank .*, got 8"):
        with_rank(8, lora={"rank_assignment": "drawn"})
    with pytest.raises(ConfigError, match=r"lora\.rank_assignment: .*'listed' or 'drawn'"):
        with_rank([8, 4, 4, 4], lora={"rank_assignment": "random"})


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, r"lora\.rank: input should be greater than 0, got 0"),
        (-3, r"lora\.rank: input should be greater than 0, got -3"),
        (2_000_000, r"lora\.rank: input should be less than or equal to 1000000"),
        (4.5, r"lora\.rank: expected an integer or a list of integers such as \[4, 8, 8\], got '4\.5'"),
        (True, r"lora\.rank: input should be a valid integer, got True"),
        ("8", r"lora\.rank: expected an integer or a list of integers such as \[4, 8, 8\], got '8'"),
        (None, r"lora\.rank: expected an integer or a list of integers such as \[4, 8, 8\], got 'None'"),
        ({"a": 1}, r"lora\.rank: expected an integer or a list of integers such as \[4, 8, 8\], got "),
        ([], r"lora\.rank: expected an integer or a list of integers such as \[4, 8, 8\], got '\[\]'"),
        ([4, 0, 4, 4], r"lora\.rank: input should be greater than 0, got 0"),
        ([4, "8", 4, 4], r"lora\.rank: input should be a valid integer, got '8'"),
        ([4, [8], 4, 4], r"lora\.rank: input should be a valid integer, got \[8\]"),
        ([4, 2.0, 4, 4], r"lora\.rank: input should be a valid integer, got 2\.0"),
    ],
    ids=str,
)
def test_ranks_that_are_none_are_refused(rank: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_rank(rank)


@pytest.mark.parametrize("other", ["gradient_checkpointing=true", "quantization=4bit"])
def test_compilation_goes_with_plain_layers_only(other: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml")
    RunConfig.load(path, ["model.compile=true"])
    with pytest.raises(ConfigError, match="compile goes with neither"):
        RunConfig.load(path, ["model.compile=true", f"model.{other}"])


def test_compilation_goes_without_dropout_only(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"model\.compile goes with lora\.dropout: 0 only"):
        RunConfig.load(path, ["model.compile=true", "lora.dropout=0.1"])
