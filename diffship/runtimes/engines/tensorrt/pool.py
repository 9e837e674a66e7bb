"""A limited number of calls at once: a further call waits, up to a time limit, for a slot that is free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from diffship.core.errors import BusyError, RunnerError


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Pool(Generic[T]):
    """Up to `size` slots, made when first needed. A slot whose call failed is closed, and another made."""

    def __init__(self, make: Callable[[], T], size: int, wait_seconds: float) -> None:
        self._make = make
        self._size = size
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._idle: list[T] = []
        self._busy = 0
        self._held = False
        self._closed = ""

    @contextmanager
    def borrow(self) -> Iterator[T]:
        """A slot for this thread.

        Raises:
            BusyError: none got free in time.
            RunnerError: the pool is closed, or the slot cannot be made.
        """
        slot = self._taken()
        try:
            yield slot
        except BaseException:
            try:
                slot.close()
            finally:
                self._returned(None)
            raise
        self._returned(slot)

    @contextmanager
    def alone(self) -> Iterator[tuple[T, ...]]:
        """All slots, for a `with` block during which no call runs.

        Raises:
            BusyError: calls under way did not end in time.
            RunnerError: the pool is closed.
        """
        with self._changed:
            self._await(lambda: not self._held)
            self._held = True
            try:
                self._await(lambda: self._busy == 0)
            except BaseException:
                self._release()
                raise
        try:
            yield tuple(self._idle)
        finally:
            with self._changed:
                self._release()

    def shut(self, reason: str) -> None:
        """Refuse every further call with `reason`; a reason that was given before stays."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """`shut`, wait for the calls that are under way, and close all slots.

        Raises:
            BusyError: they did not end in time; no slot is closed, for what it stands on is in use.
        """
        self.shut(reason)
        with self._changed:
            if not self._changed.wait_for(lambda: self._busy == 0 and not self._held, self._wait_seconds):
                raise BusyError(
                    f"{self._busy} calls did not end within {self._wait_seconds:g} s: the engine stays open"
                )
            idle, self._idle = self._idle, []
        for slot in idle:
            slot.close()

    def _taken(self) -> T:
        with self._changed:
            self._await(lambda: not self._held and self._busy < self._size)
            self._busy += 1
            if self._idle:
                return self._idle.pop()
        try:
            return self._make()
        except BaseException:
            self._returned(None)
            raise

    def _await(self, free: Callable[[], bool]) -> None:
        """With the lock held, until `free` or closed."""
        if not self._changed.wait_for(lambda: bool(self._closed) or free(), self._wait_seconds):
            raise BusyError(
                f"all {self._size} contexts were busy for {self._wait_seconds:g} s; "
                "try again, or open with more contexts"
            )
        if self._closed:
            raise RunnerError(self._closed)

    def _returned(self, slot: T | None) -> None:
        with self._changed:
            self._busy -= 1
            if slot is not None:
                self._idle.append(slot)
            self._changed.notify_all()

    def _release(self) -> None:
        self._held = False
        self._changed.notify_all()
