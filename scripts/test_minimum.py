"""Install the lowest versions that pyproject.toml allows into `.minimum/venv`, and run a part of the tests with them.

torch is the exception: older builds are taken from an index of their own or bring gigabytes of CUDA libraries, so the
version that constraints.txt pins is used, and its lower bound is not tested. What the dependencies themselves require
is resolved freely, up to what they allow.

    python scripts/test_minimum.py [pytest arguments]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".minimum" / "venv"
PINNED = "torch"
TOOLS = ("pytest>=9.0", "hypothesis>=6.130", "jaxtyping>=0.3", "beartype>=0.20", "scikit-learn>=1.5", "ray>=2.55,<3")
TESTS = (
    "tests/storage",
    "tests/artifacts",
    "tests/config",
    "tests/lora",
    "tests/methods",
    "tests/data/test_examples.py",
    "tests/data/test_encode.py",
    "tests/data/test_partition.py",
    "tests/federation/test_client.py",
    "tests/federation/test_batched.py",
    "tests/parity",
    "tests/e2e/test_stop_and_resume.py",
    "tests/e2e/test_run_directory.py",
    "tests/e2e/test_verify.py",
)


def minimum_requirements() -> list[str]:
    """Each dependency at its lower bound, torch as it is pinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    found = []
    for requirement in project["dependencies"]:
        matched = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement)
        if matched is None:
            raise ValueError(f"{requirement}: expected name>=version")
        name, version = matched.groups()
        found.append(f"{name}=={pins[name] if name == PINNED else version}")
    return found


def main() -> int:
    """Install, test, and say what was installed."""
    python = VENV / "bin" / "python"
    minimum = minimum_requirements()
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, *minimum, *TOOLS], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    subprocess.run([str(python), "-m", "pip", "check"], check=True)
    print("lowest versions: " + ", ".join(minimum), flush=True)
    arguments = sys.argv[1:] or list(TESTS)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), "-m", "pytest", "-q", "-W", "default", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
