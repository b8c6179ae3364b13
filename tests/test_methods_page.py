"""docs/methods.md: its table is what the methods say, and its worked example of a method runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sfedlora.experiment import load_state
from sfedlora.methods import Contribution
from sfedlora.types import LoraSize, Part, ServerState, part_of
from support.command_line import sfedlora, write_config
from support.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_script_writes() -> None:
    script = load_script("write_methods_table")
    assert script.methods_page(PAGE) == PAGE, "run python scripts/write_methods_table.py"


def test_the_bytes_of_the_table_by_hand() -> None:
    cells = {}
    for line in PAGE.splitlines():
        if matched := re.match(r"\| `(\w+)` \|(.*)\| (\S+) \| (\S+) \| (\S+) \|$", line):
            cells[matched[1]] = tuple(float(number) for number in matched.groups()[2:])
    one = 64 * 16 * 4096 * 4 / 1e6  # one factor of all modules, MB
    stack = 20 * 2 * one  # twenty clients' A and B
    assert cells["fedsa"] == pytest.approx((one, one, one), abs=0.06)
    assert cells["fedit"] == pytest.approx((2 * one, 2 * one, 2 * one), abs=0.06)
    assert cells["rolora"] == pytest.approx((one, one, 2 * one), abs=0.06)
    assert cells["flora"] == pytest.approx((2 * one, stack, 2 * stack), abs=0.06)
    assert cells["fedex"] == pytest.approx((2 * one, 2 * one + stack, 2 * one + 2 * stack), abs=0.06)
    assert cells["local"] == (0, 0, 0)


def test_the_method_of_the_page_runs_and_computes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "LargestChange" in block)
    (tmp_path / "largest_change.py").write_text(example, encoding="utf-8")
    config = write_config(tmp_path / "run.yaml", rounds={"num_rounds": 2}, output=str(tmp_path / "run"))
    command = next(line for line in PAGE.splitlines() if line.startswith("PYTHONPATH=. sfedlora run run.yaml "))
    arguments = command.removeprefix("PYTHONPATH=. sfedlora run run.yaml ").split()

    outcome = sfedlora(capsys, "run", str(config), *arguments)
    assert outcome.code == 2
    assert "module 'largest_change' cannot be imported" in outcome.err
    assert "PYTHONPATH" in outcome.err

    monkeypatch.syspath_prepend(tmp_path)
    outcome = sfedlora(capsys, "run", str(config), *arguments)
    assert outcome.code == 0, outcome.err
    prepared, state = load_state(tmp_path / "run")
    assert type(prepared.federation.method).__name__ == "LargestChange"
    assert set(state.personal) == set(prepared.federation.splits)
    for name, tensor in state.server.shared.items():
        assert part_of(name) is Part.A
        assert not tensor.equal(prepared.federation.initial[name])

    method = prepared.federation.method
    before = torch.zeros(2, 3)
    sent = [torch.tensor(values).float() for values in ([[1, -2, 0], [0, 0, 5]], [[-3, 1, 0], [0, 1, -4]])]
    contributions = [Contribution(str(i), {"a:m": tensor}, 0.5, 1.0) for i, tensor in enumerate(sent)]
    after = method.server_step(ServerState(0, {"a:m": before}, {}), contributions, LoraSize(2, 1.0))
    assert np.array_equal(after.shared["a:m"].numpy(), [[-3, -2, 0], [0, 1, 5]])
