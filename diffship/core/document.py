"""JSON and TOML documents that people or programs wrote: read whole, bounded, and a table at the top."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.sniff import foreign

Table = dict[str, Any]


def read_json(path: str | Path, limit: int, error: type[DiffshipError] = ConfigError) -> Table:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        error: it cannot be read, has more bytes, is not JSON, or is no object.
    """
    return _read(path, limit, error, "JSON", json.loads)


def read_toml(path: str | Path, limit: int, error: type[DiffshipError] = ConfigError) -> Table:
    """The table in a TOML file of at most `limit` bytes.

    Raises:
        error: it cannot be read, has more bytes, or is not TOML.
    """
    return _read(path, limit, error, "TOML", tomllib.loads)


def _read(path: str | Path, limit: int, error: type[DiffshipError], form: str, parse: Callable[[str], Any]) -> Table:
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise error(f"{path} is too large: at most {limit} bytes are read")
        content = parse(raw.decode("utf-8"))
    except OSError as fault:
        raise error(f"{path} cannot be read: {foreign(path, fault.strerror or str(fault), text=True)}") from None
    except (ValueError, RecursionError) as fault:
        raise error(f"{path} is not {form}: {foreign(path, str(fault)[:200], text=True)}") from None
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}; it must be a table")
    return content
