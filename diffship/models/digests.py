"""Digests of weights, remembered while their files stay as they are: to hash SDXL takes over a minute."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from diffship.core.atomic import write_file
from diffship.core.weights import Weights, identity_of, source_digest

CACHE = "DIFFSHIP_CACHE"  # the environment variable that names another folder
_HEX = re.compile(r"[0-9a-f]{64}\Z")


def remembered_digest(weights: Weights) -> str:
    """`source_digest(weights)`. If it was computed before and no file has changed since, no tensor is read.

    A file counts as unchanged if its inode, size and time of change are what they were. Digests in a bundle's manifest
    are never taken from here.
    """
    identity = identity_of(weights)
    if identity is None:
        return source_digest(weights)
    place = cache_folder() / "digests" / identity
    with suppress(OSError, ValueError):
        found = place.read_text(encoding="ascii")
        if _HEX.match(found):
            return found
    digest = source_digest(weights)
    with suppress(OSError):  # a home that cannot be written to
        place.parent.mkdir(parents=True, exist_ok=True)
        write_file(place, digest)
    return digest


def cache_folder() -> Path:
    """Where small things are kept that can be computed again: $DIFFSHIP_CACHE, or the user's cache of this system."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "diffship"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffship"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffship"
