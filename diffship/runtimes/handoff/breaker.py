"""A circuit breaker: after some failures in a row nobody is asked for a while, then one trial decides."""

from __future__ import annotations

import time
from collections.abc import Callable

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


class Breaker:
    """Opens after `failures` in a row; `seconds` later it is half-open and admits one trial.

    A trial that succeeds closes it, one that fails opens it again. `clock` gives seconds and never goes back.
    """

    def __init__(self, failures: int = 3, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._seconds = seconds
        self._clock = clock
        self._row = 0
        self._opened: float | None = None
        self._trial = False

    @property
    def state(self) -> str:
        if self._opened is None:
            return CLOSED
        return HALF_OPEN if self.wait() == 0 else OPEN

    def wait(self) -> float:
        """Seconds until a trial is admitted; 0 if one is."""
        return 0.0 if self._opened is None else max(self._opened + self._seconds - self._clock(), 0.0)

    def allow(self) -> bool:
        """Whether to ask now. Whoever is told yes reports `succeeded`, `failed` or `abandoned` once."""
        if self.state == OPEN or self._trial:
            return False
        self._trial = self.state == HALF_OPEN
        return True

    def succeeded(self) -> None:
        self._row, self._opened, self._trial = 0, None, False

    def failed(self) -> None:
        self._row += 1
        if self._trial or self._row >= self._failures:
            self._opened = self._clock()
        self._trial = False

    def abandoned(self) -> None:
        """The caller that was allowed to ask left before there was an answer."""
        self._trial = False
