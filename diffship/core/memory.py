"""How much memory this process has had."""

from __future__ import annotations

import sys

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_bytes() -> int | None:
    """The most host memory that this process has held, mapped files included; None if the system does not tell it.

    Linux's own count is taken first: `ru_maxrss` of a process begins at that of the one that started it.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file if line.startswith("VmHWM:")]
        return 1024 * int(lines[0][1])
    except (OSError, ValueError, IndexError):
        pass
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
