"""The library's surface: what is exported, that it works as DESIGN.md shows, and that importing is cheap."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import sfedlora
from sfedlora import RunConfig, RunResult, effective_clients, peft_config, resume, run, scaling_factor

PACKAGE = Path(sfedlora.__file__).parent


def test_the_example_of_the_design(tiny_run_config: Path) -> None:
    assert scaling_factor("sfed", alpha=16, rank=512, num_clients=20) == pytest.approx(16 * math.sqrt(20 / 512))
    stock = peft_config("sfed", alpha=16, rank=512, num_clients=20, target_modules=["q_proj", "v_proj"])
    assert isinstance(stock, peft.LoraConfig)
    assert stock.lora_alpha / math.sqrt(stock.r) == pytest.approx(16 * math.sqrt(20 / 512))
    result = run(RunConfig.load(tiny_run_config, ["lora.rank=2"]))
    assert isinstance(result, RunResult)
    assert result.metrics[-1]["round_num"] == result.summary["last"]["round_num"] == 2
    client = result.metrics[0]["cohort"][0]
    assert peft.LoraConfig.from_pretrained(str(result.adapter(client))).r == 2
    assert result.adapter() == result.run_dir / "adapters" / "shared"
    again = resume(result.run_dir)
    assert again == result
    with pytest.raises(sfedlora.errors.InputError, match="no adapter of client 'nobody'; clients are"):
        result.adapter("nobody")
    assert effective_clients([0.5, 0.5]) == 2


@pytest.fixture
def tiny_run_config(tmp_path: Path) -> Path:
    from support.command_line import write_config

    return write_config(tmp_path / "run.yaml", output=str(tmp_path / "run"))


def test_what_is_exported_is_what_all_says() -> None:
    assert set(sfedlora.__all__) == set(sfedlora._HOMES)
    for name in sfedlora.__all__:
        assert getattr(sfedlora, name) is not None
        assert name in dir(sfedlora)
    with pytest.raises(AttributeError, match="no attribute 'rnu'"):
        sfedlora.rnu  # noqa: B018
    typed = {
        alias.asname
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sfedlora")
        for alias in node.names
    }
    assert typed == set(sfedlora.__all__), "type checkers see the same names"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_a_docstring_and_all(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    assert "__all__" in names or (path.name == "__init__.py" and len(tree.body) <= 2)


def test_help_and_configuration_errors_come_without_torch() -> None:
    """Measured by what is loaded, because a busy machine's clock says little."""
    code = (
        "import sys\n"
        "from sfedlora.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "sys.exit(100 + len(heavy) if heavy else code or 0)\n"
    )
    for arguments, expected in (
        (["--help"], 0),
        (["run", "--help"], 0),
        (["compare", "--help"], 0),
        (["run", "none.yaml"], 2),
        (["compare", "none.yaml", "--ranks", "4"], 2),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == expected, (arguments, done.stderr)
