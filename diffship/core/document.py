"""JSON and TOML documents that people or programs wrote: read whole, bounded, and a table at the top."""

from __future__ import annotations

import json
import os
import select
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.sniff import foreign

Table = dict[str, Any]
PIPE_SECONDS = 60.0
_PIECE = 1 << 16


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
    raw = read_bytes(path, limit, error)
    try:
        content = parse(raw.decode("utf-8-sig"))  # some editors put a mark before the text
    except (ValueError, RecursionError) as fault:
        raise error(f"{path} is not {form}: {foreign(path, str(fault)[:200], text=True)}") from None
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}; it must be a table")
    return content


def read_bytes(path: str | Path, limit: int, error: type[DiffshipError] = ConfigError) -> bytes:
    """What a file of at most `limit` bytes holds, or what comes through a pipe until its writer closes it.

    No more than `limit` + 1 bytes are taken, whatever size is claimed. A pipe may be silent for PIPE_SECONDS at most.
    Devices and sockets are not read.

    Raises:
        error: it cannot be read, or has more bytes.
    """
    try:
        with _opened(path) as file:
            raw = _taken(file, limit + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read: {foreign(path, fault.strerror or str(fault), text=True)}") from None
    if len(raw) > limit:
        raise error(f"{path} is too large: at most {limit} bytes are read")
    return raw


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    # O_NONBLOCK: a pipe without a writer must not hang
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        yield file
    finally:
        os.close(file)


def _taken(file: int, most: int) -> bytes:
    """Up to `most` bytes, until there are no more."""
    mode, taken = os.fstat(file).st_mode, bytearray()
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is neither a file nor a pipe")
    while len(taken) < most:
        if stat.S_ISFIFO(mode) and not select.select([file], [], [], PIPE_SECONDS)[0]:
            raise OSError(f"nothing came through this pipe for {PIPE_SECONDS:g} seconds")
        piece = os.read(file, min(_PIECE, most - len(taken)))
        if not piece:
            break
        taken += piece
    return bytes(taken)
