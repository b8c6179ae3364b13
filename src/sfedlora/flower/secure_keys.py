"""The keys of secure sums at a site: its own private key in one file, everybody's public keys in another.

Beside the private key lies a folder that says what was sent under it (`secure_round.SentMessages`): the masks are the
key's, so whoever loses that record must make a new key.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sfedlora.errors import ConfigError
from sfedlora.privacy.secure_sum import new_private_key, public_key_of
from sfedlora.storage import add_file

__all__ = ["SiteKeys", "read_site_keys", "write_private_key"]

KEY_BYTES = 32
OTHERS_READ, OTHERS_WRITE = 0o077, 0o022
"""Permissions of a file that others than its owner have."""


@dataclass(frozen=True)
class SiteKeys:
    """What a site needs for secure sums.

    Attributes:
        private_key: its own.
        public_keys: client id -> public key, its own among them.
        sent: the folder that says what was sent under its key.
    """

    private_key: bytes = field(repr=False)
    public_keys: Mapping[str, bytes]
    sent: Path


def write_private_key(path: Path) -> str:
    """Make a key; the file is its owner's alone.

    Returns:
        The public key in hex, to be given to the other sites.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    key = new_private_key()
    try:
        add_file(path, f"{key.hex()}\n".encode(), private=True)
    except FileExistsError:
        raise ConfigError(f"{path} exists; a key is never written over: choose another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another folder") from None
    return public_key_of(key).hex()


def read_site_keys(client_id: str, private: Path, public: Path, *, sites: Collection[str]) -> SiteKeys:
    """Read a site's keys.

    Args:
        client_id: the site.
        private: file of its private key, as `write_private_key` makes it.
        public: JSON file, client id -> public key in hex.
        sites: whose public keys must be there.

    Raises:
        ConfigError: a file cannot be used, others can read the private or write the public one, a key is missing or
            stands twice, or the site's two keys do not belong together.
    """
    key = _key(_content(private, OTHERS_READ, "chmod 600"), f"secure-key={private}")
    where = f"secure-public-keys={public}"
    try:
        given = json.loads(_content(public, OTHERS_WRITE, "chmod go-w"))
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ConfigError(f'node config: {where} is no JSON object; expected {{"client id": "public key in hex", ...}}')
    keys = {name: _key(text, f"{where}: key of {name!r}") for name, text in given.items()}
    missing = sorted({*sites, client_id} - keys.keys())
    if missing:
        raise ConfigError(f"node config: {where} has no key of {', '.join(missing)}; ask that site for it")
    if len({*keys.values()}) < len(keys):
        raise ConfigError(f"node config: {where} has one key twice; every site makes its own")
    if keys[client_id] != public_key_of(key):
        raise ConfigError(f"node config: {where}: the key of {client_id!r} is not that of secure-key={private}")
    return SiteKeys(key, keys, private.with_name(f"{private.name}.sent") / keys[client_id].hex()[:16])


def _content(path: Path, forbidden: int, remedy: str) -> str:
    """The text of a file that others have no such permission for."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = path.stat().st_mode
            if mode & forbidden:
                raise ConfigError(
                    f"node config: {path} has permissions {mode & 0o777:o}, which others can use; {remedy} {path}"
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"node config: {path} cannot be read ({reason})") from None


def _key(text: object, where: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip() if isinstance(text, str) else "")
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"node config: {where} is no key; expected {2 * KEY_BYTES} hexadecimal digits")
    return key
