"""The life of one request: states, deadline, who listens; and the results that a retry may still want."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import Cancelled, ConfigError, DeadlineError, DiffshipError, RunnerError
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import Drawn, Order

Pixels = NDArray[np.uint8]  # (height, width, 3)
Clock = Callable[[], float]
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
CANCELLED, EXPIRED = "cancelled", "expired"


class ConflictError(ConfigError):
    """The same Idempotency-Key came with another request."""


@dataclass(frozen=True)
class Progress:
    """`step` of `calls` model calls are made; `previews` are pixels, one an image, if they were asked for."""

    step: int
    calls: int
    previews: tuple[Pixels, ...] = ()


Listener = Callable[[Progress | None], None]  # None: it has ended


class Generation:
    """One accepted request. Threads may share it: a worker moves it, a handler listens, and the first end counts.

    `deadline` is a reading of `clock`, in seconds. `on_end` hears of the end whoever listens.
    """

    def __init__(
        self,
        name: str,
        order: Order,
        deadline: float,
        clock: Clock = time.monotonic,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        self.name = name  # of the model
        self.order = order
        self.deadline = deadline
        self.state = WAITING
        self.drawn: Drawn | None = None
        self.fault: Exception | None = None
        self.created = clock()
        self.started: float | None = None
        self.ended_at: float | None = None
        self._clock = clock
        self._on_end = on_end
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._listeners: list[Listener] = []

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    def seconds_left(self) -> float:
        return self.deadline - self._clock()

    def listen(self, listener: Listener) -> None:
        """Hear of every step and of the end; at once if it has ended already."""
        with self._lock:
            self._listeners.append(listener)
        if self.ended:
            listener(None)

    def leave(self, listener: Listener) -> None:
        """Stop listening. A request that nobody listens to any more is cancelled."""
        with self._lock:
            with suppress(ValueError):
                self._listeners.remove(listener)
            alone = not self._listeners
        if alone:
            self.cancel()

    def begin(self) -> None:
        """A worker has taken it."""
        with self._lock:
            if not self.ended:
                self.state, self.started = RUNNING, self._clock()

    def progress(self, made: Progress) -> None:
        for listener in self._heard():
            listener(made)

    def finish(self, drawn: Drawn) -> bool:
        """Whether this was the first end."""
        return self._end(DONE, drawn, None)

    def fail(self, fault: Exception) -> bool:
        return self._end(FAILED, None, fault)

    def cancel(self) -> bool:
        return self._end(CANCELLED, None, Cancelled("the client left"))

    def expire(self) -> bool:
        given = round(self.deadline - self.created, 2)
        return self._end(EXPIRED, None, DeadlineError(f"not finished within its deadline of {given:g} s"))

    def release(self) -> None:
        """Let go of what the work was made of, megabytes if a trajectory came in; the result stays."""
        self.order = replace(self.order, begin=_spent, end=_spent)

    def result(self, timeout: float | None = None) -> Drawn:
        """Wait for the end.

        Raises:
            DeadlineError: not within `timeout` seconds, or not within its own deadline.
            Exception: what it failed with.
        """
        if not self._over.wait(timeout):
            raise DeadlineError(f"not finished within {timeout} s")
        if self.drawn is None:
            raise self.fault or DiffshipError("ended without a result")
        return self.drawn

    def _end(self, state: str, drawn: Drawn | None, fault: Exception | None) -> bool:
        with self._lock:
            if self._over.is_set():
                return False
            self.state, self.drawn, self.fault, self.ended_at = state, drawn, fault, self._clock()
            self._over.set()
            listeners, begun = list(self._listeners), self.started is not None
        if self._on_end is not None:
            self._on_end(self)
        if not begun:  # else the worker that draws it lets go
            self.release()
        for listener in listeners:
            listener(None)
        return True

    def _heard(self) -> list[Listener]:
        with self._lock:
            return [] if self.ended else list(self._listeners)


def _spent(*_: object) -> NoReturn:
    raise RunnerError("this request was drawn before")


class Kept:
    """Requests by Idempotency-Key: what runs, and what is done, bounded by count, bytes and time.

    What failed, expired or was cancelled is forgotten, so that a retry draws anew.
    """

    def __init__(self, options: ServeOptions, clock: Clock = time.monotonic) -> None:
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[bytes, Generation]] = OrderedDict()

    def once(self, key: str, fingerprint: bytes, make: Callable[[], Generation]) -> Generation:
        """The generation of `key`, made if there is none.

        Raises:
            ConflictError: the key came with another fingerprint before.
        """
        with self._lock:
            self._sweep()
            if key in self._entries:
                known, generation = self._entries[key]
                if known != fingerprint:
                    raise ConflictError("this Idempotency-Key came with another request before; take a fresh one")
                return generation
            made = make()
            self._entries[key] = (fingerprint, made)
            return made

    def _sweep(self) -> None:
        now, options = self._clock(), self._options
        for key, (_, generation) in list(self._entries.items()):
            if generation.ended and (
                generation.state != DONE or now - (generation.ended_at or now) > options.kept_seconds
            ):
                del self._entries[key]
        done = [(key, generation) for key, (_, generation) in self._entries.items() if generation.drawn]
        total = sum(generation.drawn.size_bytes for _, generation in done if generation.drawn)
        for key, generation in done:  # the oldest first
            if len(done) <= options.kept_results and total <= options.kept_bytes:
                return
            total -= generation.drawn.size_bytes if generation.drawn else 0
            done = done[1:]
            del self._entries[key]
