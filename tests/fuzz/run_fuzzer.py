"""Coverage-guided fuzzing of one parser at the border: `python tests/fuzz/run_fuzzer.py TARGET SECONDS`; needs atheris.

What libFuzzer finds new goes to a folder of its own; an input that crashes is written to `--crashes`. Copy a fixed one
into `tests/fuzz/corpus/TARGET/`, where the tests replay it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import resource
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
MAX_MEMORY_MIB = 2048


def main() -> None:
    """Fuzz until the time is over or an input crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py")))
    parser.add_argument("seconds", type=int)
    parser.add_argument("--found", type=Path, required=True, help="folder for inputs that reach new code")
    parser.add_argument("--crashes", type=Path, required=True, help="folder for inputs that crash")
    parser.add_argument("--max-length", type=int, default=4096)
    arguments = parser.parse_args()
    for folder in (arguments.found, arguments.crashes):
        folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE.parent))
    with atheris.instrument_imports(include=["yaml"]):
        importlib.import_module("yaml")
    for large in ("torch", "datasets", "transformers"):  # not instrumented: not what is tested
        importlib.import_module(large)
    with atheris.instrument_imports(include=["sfedlora"]):
        target = importlib.import_module(f"fuzz.fuzz_{arguments.target}")
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    options = [
        f"-max_total_time={arguments.seconds}",
        f"-rss_limit_mb={MAX_MEMORY_MIB}",
        f"-max_len={arguments.max_length}",
        f"-artifact_prefix={arguments.crashes}/{arguments.target}-",
        "-print_final_stats=1",
        "-timeout=20",
    ]
    corpus = [str(arguments.found), str(HERE / "corpus" / arguments.target)]
    atheris.Setup([sys.argv[0], *options, *corpus], target.fuzz_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
