"""When a process that died may be started anew: at once, then after growing pauses, and only so often in a minute."""

from __future__ import annotations

from collections import deque

from diffship.runtimes.serve.jobs import Clock

WITHIN_SECONDS = 60.0
_FIRST_SECONDS = 0.5  # before the second start; it doubles


class Restarts:
    """Counts starts by `clock`; at most `most` of them in any `WITHIN_SECONDS`."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._most = most
        self._clock = clock
        self._times: deque[float] = deque(maxlen=most)

    def wait(self) -> float:
        """Seconds until the next start is due; 0 or less: now."""
        now = self._clock()
        recent = [time for time in self._times if now - time < WITHIN_SECONDS]
        if not recent:
            return 0.0
        if len(recent) == self._most:
            return recent[0] + WITHIN_SECONDS - now
        return recent[-1] + _FIRST_SECONDS * 2.0 ** (len(recent) - 1) - now

    def note(self) -> None:
        """One is made now."""
        self._times.append(self._clock())
