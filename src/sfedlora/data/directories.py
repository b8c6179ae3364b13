"""Directory names for client ids."""

from __future__ import annotations

import hashlib
import re

__all__ = ["safe_directory_name"]

SAFE = re.compile(r"[a-z0-9_][a-z0-9_-]{0,63}")
RESERVED = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")  # device names on Windows
SLUG_LENGTH = 40


def safe_directory_name(client_id: str) -> str:
    """A directory name for a client id: the id itself where that is safe, else a readable part and a digest.

    Names stay different on file systems that ignore case (a safe id has no capitals), hold no separator, are never
    ".", ".." or empty and have at most 73 characters. No safe id contains the "~" that precedes a digest.
    """
    if SAFE.fullmatch(client_id) and not RESERVED.fullmatch(client_id):
        return client_id
    slug = re.sub(r"[^a-z0-9_-]+", "-", client_id.lower())[:SLUG_LENGTH].strip("-") or "client"
    digest = hashlib.sha256(client_id.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{slug}~{digest}"
