"""The written app: what a client process imports for every message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sfedlora

APP = Path(sfedlora.__file__).parent / "assets" / "flower_app"
HEAVY = ("torch", "transformers", "peft", "datasets")


def test_a_client_process_imports_nothing_that_takes_seconds() -> None:
    code = f"import sys; sys.path.insert(0, {str(APP)!r}); import app; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "sfedlora.flower.client_app" in loaded
    assert "sfedlora.flower.server_app" in loaded
    assert [name for name in HEAVY if name in loaded] == []
