"""`sfedlora flower init`: a folder with a Flower app and all that is needed to run it."""

from __future__ import annotations

import secrets
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from sfedlora.config import RunConfig
from sfedlora.errors import ConfigError
from sfedlora.setup.server import require_deployable
from sfedlora.storage import write_text

__all__ = ["write_app"]

_TEMPLATES = {
    "app/pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "env.sh": "env.sh.txt",
    "home/config.toml": "config.toml.txt",
    "deploy/superlink.service": "superlink.service.txt",
    "deploy/site.service": "site.service.txt",
    "deploy/proxy.conf": "proxy.conf.txt",
}
ID_BYTES = 6


def write_app(folder: Path, config: RunConfig) -> list[Path]:
    """Write the app of a configuration.

    Args:
        folder: absent or empty.
        config: without `flower.federation_id` it gets a new one.

    Returns:
        The files written.

    Raises:
        ConfigError: the folder is in use, or the configuration cannot run across sites.
        StorageError: a file cannot be written.
    """
    if config.flower.federation_id is None:
        config = config.with_values({"flower.federation_id": f"federation-{secrets.token_hex(ID_BYTES)}"})
    require_deployable(config)
    root = folder.absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{folder} is no empty folder; choose another one for the app")
    sites = config.flower.sites or ()
    values = {
        "name": "sfedlora-federation",
        "federation_id": config.flower.federation_id,
        "model": config.model.source,
        "num_sites": str(len(sites) or config.partition.num_clients),
        "first_site": sites[0] if sites else "site0",
        "output": str(root / "run"),
        "home": str(root / "home"),
        "certificates": str(root / "certificates"),
    }
    _require_plain(values)
    source = files("sfedlora") / "assets" / "flower_app"
    written = []
    try:
        for name in {Path(path).parent for path in _TEMPLATES}:
            (root / name).mkdir(parents=True, exist_ok=True)
        for path, template in _TEMPLATES.items():
            text = (source / template).read_text(encoding="utf-8")
            write_text(root / path, Template(text).substitute(values))
            written.append(root / path)
        write_text(root / "app" / "app.py", (source / "app.py").read_text(encoding="utf-8"))
        write_text(root / "app" / "run.yaml", config.dump())
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); choose another one") from None
    return [*written, root / "app" / "app.py", root / "app" / "run.yaml"]


def _require_plain(values: dict[str, str | None]) -> None:
    """Refuse text that would mean something else in the files it is written to."""
    for name, value in values.items():
        if value is None or any(character in value for character in '"\\\n\r\0$`'):
            raise ConfigError(f"{name} {value!r}: quotes, backslashes, dollar signs and line ends cannot be used here")
