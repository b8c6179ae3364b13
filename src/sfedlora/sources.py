"""Where a model or data source string points to.

A source is a path, a Hugging Face hub id, or `package:NAME/path`: a file or folder inside an installed package,
found without importing (and so without running) that package.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from sfedlora.errors import InputError

__all__ = ["PACKAGE_PREFIX", "cache_root", "local_path"]

PACKAGE_PREFIX = "package:"
LONGEST_SHOWN = 120


def local_path(source: str) -> Path | None:
    """The local file or folder that a source names.

    Args:
        source: a path, `package:NAME/path`, or a hub id.

    Returns:
        An existing path, or None where the source can only be a hub id.

    Raises:
        InputError: a package that is not installed, a path that leaves the package or does not exist, one that the
            file system refuses (too long, not permitted), a home folder of nobody.
    """
    try:
        if source.startswith(PACKAGE_PREFIX):
            return _inside_package(source)
        path = Path(source).expanduser()
        return path if path.exists() else None
    except OSError as error:
        shown = source if len(source) <= LONGEST_SHOWN else f"{source[:LONGEST_SHOWN]}..."
        raise InputError(
            f"{shown!r}: cannot be used as a path ({error.strerror}); expected a path or a hub id"
        ) from None
    except RuntimeError:
        raise InputError(f"{source!r}: there is no such home folder; give the whole path") from None


def cache_root() -> Path:
    """Folder for converted models and encoded data: `$SFEDLORA_CACHE`, else `~/.cache/sfedlora`."""
    configured = os.environ.get("SFEDLORA_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "sfedlora"


def _inside_package(source: str) -> Path:
    name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier():
        raise InputError(f"{source!r}: expected package:NAME/path with NAME an importable package name")
    try:
        spec = find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{source!r}: package {name!r} is not installed here; install it with pip first")
    relative = PurePosixPath(inside)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{source!r}: the path must stay inside the package")
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / relative
    if not path.exists():
        parent = path.parent if path.parent.is_dir() else root
        there = ", ".join(sorted(entry.name for entry in parent.iterdir())[:12])
        raise InputError(f"{source!r}: nothing at {inside!r} in package {name!r}; {parent.name}/ holds: {there}")
    return path
