"""Ctrl-C and SIGTERM, remembered: a library in whose midst one falls may raise another error in its place."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, ClassVar

_DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def raise_if_heard() -> None:
    """Raises KeyboardInterrupt if a signal came and a library swallowed what it raised, so that the work went on."""
    if Stops.entered is not None and Stops.entered.number is not None:
        raise KeyboardInterrupt


class Stops:
    """While it is entered, both signals raise KeyboardInterrupt, so that everything begun is taken back.

    A signal that is ignored (a shell's background job) or that another program handles stays so. Only the main
    thread may set handlers; elsewhere nothing is changed.
    """

    entered: ClassVar[Stops | None] = None

    def __init__(self) -> None:
        self.number: int | None = None
        self._process = os.getpid()
        self._set: list[int] = []

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            self._set = [number for number, default in _DEFAULTS.items() if signal.getsignal(number) == default]
        for number in self._set:
            signal.signal(number, self._heard)
        Stops.entered = self
        return self

    def __exit__(self, *fault: object) -> None:
        Stops.entered = None
        for number in self._set:
            signal.signal(number, _DEFAULTS[number])

    def settle(self) -> None:
        """From here on the end is being told: an impatient second Ctrl-C changes nothing."""
        for number in self._set:
            signal.signal(number, signal.SIG_IGN)

    @property
    def code(self) -> int:
        """The exit status that shells expect of a process that a signal has ended."""
        return 128 + (self.number or signal.SIGINT)

    @property
    def word(self) -> str:
        """What it is called: interrupted, terminated."""
        return _WORDS[signal.Signals(self.number or signal.SIGINT)]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, whose parent ends it by this signal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number = self.number or number
        raise KeyboardInterrupt
