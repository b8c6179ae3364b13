"""Methods from outside the package: found as Python imports them, checked before anything else is loaded."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError, UpdateError
from sfedlora.methods import METHODS, FedSA, aggregate, find_method, make_method
from sfedlora.types import LoraSize, LoraSizes, Part, ServerState, Update
from support.tiny_federation import run_all, tiny_federation

NUMBERS = itertools.count()
"""Every test writes a module of another name: what was imported once stays imported."""

MEAN = '''
from typing import ClassVar

from sfedlora.methods import Traits
from sfedlora.methods.base import ALL_PARTS, mean_of_shared


class Mean:
    """FedIT, in one file outside the package, with the head always shared."""

    name: ClassVar[str] = "mean"
    traits: ClassVar[Traits] = Traits(exact="no")

    def trained_parts(self, round_num):
        return ALL_PARTS

    def shared_parts(self, round_num):
        return ALL_PARTS

    def broadcast_parts(self, round_num, *, is_current):
        return ALL_PARTS

    def personal_parts(self):
        return frozenset()

    def server_step(self, state, contributions, size):
        return mean_of_shared(state, contributions)
'''
LEAST: dict[str, Any] = {"model": {"source": "m"}, "data": {"source": "d"}, "partition": {"num_clients": 4}}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module into a folder on the import path and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"a_method_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return name

    return write


def test_a_method_of_ones_own_is_found_and_steps_like_the_one_it_repeats(written: Any) -> None:
    method = make_method(f"{written(MEAN)}:Mean")
    assert method.name == "mean"
    own = tiny_federation(method=method, init="shared", rule="lora")
    ours = tiny_federation(method="fedit", init="shared", rule="lora")
    one, two = run_all(own).states[-1].server.shared, run_all(ours).states[-1].server.shared
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_its_updates_are_checked_like_those_of_any_other(written: Any) -> None:
    method = make_method(f"{written(MEAN)}:Mean")
    state, sizes = ServerState(0, {"a:x": torch.zeros(2, 3)}, {}), LoraSizes(LoraSize(2, 1.0))
    transposed = Update("ann", 1, 1, {"a:x": torch.zeros(3, 2)})
    with pytest.raises(UpdateError, match=r"'ann', tensor 'a:x': has shape \(3, 2\); expected \(2, 3\)"):
        aggregate(method, state, [transposed], weighting="uniform", sizes=sizes)


def test_a_configuration_names_it(written: Any) -> None:
    name = f"{written(MEAN)}:Mean"
    config = RunConfig.from_mapping({**LEAST, "method": {"name": name}})
    assert RunConfig.from_mapping(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match=r"lora.rank: method .*:Mean' needs one rank for all clients"):
        RunConfig.from_mapping({**LEAST, "method": {"name": name}, "lora": {"rank": [1, 2, 3, 4]}})


def test_a_head_without_an_argument_for_it_is_taken_as_the_method_has_it(written: Any) -> None:
    name = f"{written(MEAN)}:Mean"
    assert Part.HEAD not in make_method(name).personal_parts()
    assert make_method(name, "shared").name == "mean"  # what `auto` becomes in a run's config.yaml
    with pytest.raises(ConfigError, match=r"method\.head: the head of method .*:Mean' is shared, got 'personal'"):
        make_method(name, "personal")
    argued = MEAN.replace(
        "    def trained", '    def __init__(self, head="personal"):\n        self.head = head\n\n    def trained'
    )
    argued = argued.replace("frozenset()", 'frozenset({Part.HEAD} if self.head == "personal" else ())')
    other = f"{written('from sfedlora.types import Part' + argued)}:Mean"
    for head, personal in (("auto", True), ("personal", True), ("shared", False)):
        assert (Part.HEAD in make_method(other, head).personal_parts()) == personal  # type: ignore[arg-type]


def test_names_of_the_package_come_first() -> None:
    assert find_method("fedsa") is FedSA
    assert all(find_method(name) is METHODS[name] for name in METHODS)
    assert find_method("sfedlora.methods.fedsa:FedSA") is FedSA


BROKEN: dict[str, tuple[str, str, str]] = {
    # the module, what follows its name, what the message says
    "no class": (MEAN, ":Median", "module '{module}' has no class 'Median'"),
    "no class name": (MEAN, ":", "module '{module}' has no class ''"),
    "a function": ("def Mean():\n    return 1", ":Mean", "has no class 'Mean'"),
    "an object": (f"{MEAN}\nmean = Mean()", ":mean", "has no class 'mean'"),
    "missing members": (
        MEAN.replace("def server_step", "def step").replace("name: ClassVar", "nom: ClassVar"),
        ":Mean",
        "the class lacks name, server_step; see sfedlora.methods.base.Method",
    ),
    "a declared member without a value": (
        MEAN.replace(' = Traits(exact="no")', ""),
        ":Mean",
        "the class lacks traits",
    ),
    "traits of another type": (
        MEAN.replace('Traits(exact="no")', '{"exact": "no"}'),
        ":Mean",
        "traits is no sfedlora.methods.Traits",
    ),
    "a constructor with arguments": (
        MEAN.replace("    def trained", "    def __init__(self, beta):\n        self.beta = beta\n\n    def trained"),
        ":Mean",
        "cannot be made without arguments (TypeError: Mean.__init__() missing 1 required",
    ),
    "a constructor that fails": (
        MEAN.replace("    def trained", "    def __init__(self):\n        raise OSError('no disk')\n\n    def trained"),
        ":Mean",
        "cannot be made without arguments (OSError: no disk); give every field a default",
    ),
    "a module that raises": (
        "raise RuntimeError('not today')",
        ":Mean",
        "module '{module}' cannot be imported (RuntimeError: not today); install it or put its folder on PYTHONPATH",
    ),
    "a module that ends the process": ("import sys\nsys.exit(7)", ":Mean", "cannot be imported (SystemExit: 7)"),
    "a module that is no Python": ("def", ":Mean", "cannot be imported (SyntaxError: "),
    "a module that imports what is not there": (
        "import no_such_package_of_mine",
        ":Mean",
        "(ModuleNotFoundError: No module named 'no_such_package_of_mine')",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_module_or_class_that_is_no_method_is_refused(what: str, written: Any) -> None:
    source, rest, words = BROKEN[what]
    module = written(source)
    with pytest.raises(ConfigError) as caught:
        find_method(module + rest)
    message = str(caught.value)
    assert f"'{module}{rest}': " in message
    assert words.format(module=module) in message
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping({**LEAST, "method": {"name": module + rest}})
    assert message in str(caught.value)
    assert "method.name" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_of_mine:Mean", r"'no_such_module_of_mine:Mean': module .* \(ModuleNotFoundError: "),
        (":Mean", r"':Mean': module '' cannot be imported"),
        (".relative:Mean", r"'\.relative:Mean': module '\.relative' cannot be imported"),
        ("mean", r"unknown method 'mean'; .* or module:Class for one of your own"),
        ("a/path.py:Mean", r"'a/path\.py:Mean': module 'a/path\.py' cannot be imported"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_method(name)


def test_a_module_of_the_working_directory_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_alone.py").write_text(MEAN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the installed command has it
    with pytest.raises(ConfigError, match="'here_alone' cannot be imported"):
        find_method("here_alone:Mean")
