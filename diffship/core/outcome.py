"""What commands make of an error: its kind, one line for the user, an exit code."""

from __future__ import annotations

import os

from diffship.core.errors import DiffshipError, MissingExtra
from diffship.core.lazy import EXTRAS


def outcome(fault: BaseException) -> tuple[str, str, int]:
    """(kind, one line, exit code)."""
    if isinstance(fault, DiffshipError):
        return type(fault).__name__, str(fault), fault.exit_code
    known = EXTRAS.get((fault.name or "").partition(".")[0]) if isinstance(fault, ModuleNotFoundError) else None
    if known:
        return "MissingExtra", str(MissingExtra(*known)), 3
    if isinstance(fault, (OSError, MemoryError)):
        return type(fault).__name__, _system_message(fault), 3
    # a fault of ours: still one line, and how to see the rest
    return "InternalError", f"internal error: {type(fault).__name__}: {_one_line(fault)}. Run again with --debug", 1


def _system_message(fault: OSError | MemoryError) -> str:
    if isinstance(fault, MemoryError):
        return "out of memory; a smaller --size, fewer --images or --memory low needs less"
    if isinstance(fault, FileNotFoundError) and not fault.filename and _astray():
        return "the folder that this was started in is gone; change to one that exists"
    name = f": {_one_line(fault.filename)}" if fault.filename else ""
    return f"{fault.strerror or _one_line(fault)}{name}"


def _astray() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _one_line(told: object) -> str:
    text = " ".join(str(told).split())
    return text if len(text) <= 300 else text[:297] + "..."
