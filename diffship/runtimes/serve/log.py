"""Lines of the server's log that clients can cause: bounded in number, and safe to look at on a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from diffship.core.printable import printable

REQUESTS = "diffship.serve.requests"  # asks that drew nothing: health, metrics, refusals


class Throttle(logging.Filter):
    """Lets `burst` lines through at once and `rate` a second from then on; the next one counts those left out."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = float(burst), clock()
        self._left_out = 0
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            now = self._clock()
            self._tokens = min(self._tokens + self._rate * (now - self._at), self._burst)
            self._at = now
            if self._tokens < 1:
                self._left_out += 1
                return False
            self._tokens -= 1
            left_out, self._left_out = self._left_out, 0
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more such lines are left out)", None
        return True


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr(quiet: bool) -> None:
    """One line a request, and the reasons of failures; if `quiet`, those alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(asctime)s %(message)s"))
    for name in ("diffship.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or name.startswith("uvicorn") else logging.INFO)
    for name, rate in ((REQUESTS, 10.0), ("uvicorn.error", 1.0)):
        logging.getLogger(name).filters = [Throttle(rate, burst=200 if rate > 1 else 20)]
