"""Standard streams as a command finds them: closed, broken, or in a code page that lacks a character."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

_STREAMS = ("stdin", "stdout", "stderr")  # descriptors 0, 1 and 2
_BYTES_KEPT = "diffship.surrogateescape"  # a name of ours among the error handlers of codecs


def prepare() -> None:
    """Let every stream be written to, whatever the parent left: what was done is not lost to how it is told.

    A daemon's or a cron job's closed stream leads nowhere from here on; so does its descriptor, which the next file
    to be opened would get otherwise, and with it all that a library prints. A character that stdout's code page lacks
    is written as Python writes it (`\\u0431`), as it is on stderr; bytes of a file's name stay what they are if the
    locale says so.
    """
    for number, name in enumerate(_STREAMS):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            _open(number)
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what a caller put in its place may have none
    if reconfigure is not None:
        reconfigure(errors=_BYTES_KEPT if sys.stdout.errors in ("surrogateescape", _BYTES_KEPT) else "backslashreplace")


def silence(stream: TextIO) -> None:
    """Let a broken stream lead nowhere, also when the interpreter flushes it at its end."""
    with suppress(OSError, ValueError):  # one without a descriptor is a caller's own
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _bytes_kept(fault: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(fault)
    except UnicodeError:
        return codecs.backslashreplace_errors(fault)


codecs.register_error(_BYTES_KEPT, _bytes_kept)


def _open(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        os.set_inheritable(number, True)
