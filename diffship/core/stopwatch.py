"""Seconds of one piece of work, beside what it gave."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the seconds that it took."""
    since = time.perf_counter()
    made = work()
    return made, time.perf_counter() - since
