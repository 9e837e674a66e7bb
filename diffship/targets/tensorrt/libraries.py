"""The two TensorRT libraries: their names and packages, how they are opened, and what they last complained of."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from functools import cache
from typing import Any

from diffship.core.errors import DiffshipError, MissingExtra, UnsupportedError
from diffship.core.lazy import installed, need

RTX, TRT = FLAVOURS = ("rtx", "trt")
# flavour -> modules (the RTX bindings come without the meta package too), the package, its extra
MODULES = {RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings"), TRT: ("tensorrt",)}
PACKAGES = {RTX: "tensorrt-rtx", TRT: "tensorrt"}  # and the extra of that name


def library(flavour: str) -> Any:
    """The module of TensorRT-RTX or TensorRT.

    Raises:
        MissingExtra: it is not installed.
        UnsupportedError: it is, and does not start.
    """
    for name in MODULES[flavour]:
        if not installed(name):
            continue
        try:
            return need(name)
        except DiffshipError:
            raise
        except (ImportError, OSError) as fault:
            reason = " ".join(str(fault).split())[:240]
            raise UnsupportedError(f"{PACKAGES[flavour]} does not start: {reason}") from None
    raise MissingExtra(PACKAGES[flavour], PACKAGES[flavour])


@cache
def journal(trt: Any) -> Any:
    """The logger of that library, one per process: it keeps the last errors, and `words()` tells them.

    TensorRT holds a bare pointer to the first logger that it is given, so this one is never let go.
    """
    errors: deque[str] = deque(maxlen=4)
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    def start(self: Any) -> None:
        trt.ILogger.__init__(self)

    def log(self: Any, severity: Any, message: str) -> None:
        if severity in severe:
            errors.append(message)

    def words(self: Any) -> str:
        """What was logged since the last time, the first error first, in one bounded line."""
        said = [*errors]
        errors.clear()
        return " ".join("; ".join(said).split())[:300] or "it does not say why"

    return type("Journal", (trt.ILogger,), {"__init__": start, "log": log, "words": words})()


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded here."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
