"""Progress on stderr: one bar that moves with the phase on a terminal, regular lines in a log, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from diffship.cli.output import size_text
from diffship.cli.stops import raise_if_heard
from diffship.core.job import Bytes
from diffship.core.printable import printable
from diffship.core.streams import silence


class Stages(AbstractContextManager["Stages"]):
    """Called as `stages(label, done, total)`, from one thread; a new label is a new phase of the one bar.

    A terminal sees the bar move, also while a phase tells nothing of itself. A log has a line when a phase begins, and
    after ten seconds (after ten minutes: after sixty) one that says how far it is. What is done when it is first
    heard, as (label, 1, 1), is a message: it stays on a terminal, and the phase goes on.
    """

    def __init__(self, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._clock = clock
        self._phase: Phase | None = None
        self._told = 0.0  # when the last line of the log was
        self._bar: Any = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        raise_if_heard()
        if self._quiet:
            return
        with self._lock:
            if done >= total == 1 and (self._phase is None or self._phase.label != label):
                self._message(label)
            elif self._phase is None or self._phase.label != label:
                self._begin(Phase(label, done, total, self._clock()))
            else:
                self._phase.done = done
            self.tick()

    def tick(self) -> None:
        """Show how far the phase is, if it is time for that."""
        with self._lock:
            if self._phase is None:
                return
            now = self._clock()
            if self._bar is not None:
                self._bar.n = self._phase.done
                self._bar.refresh()
            elif not self._terminal and now - self._told >= (10 if now - self._phase.begun < 600 else 60):
                self._told = now
                say(self._phase.line(now))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with self._lock:
            self._phase = None
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _begin(self, phase: Phase) -> None:
        self._phase, self._told = phase, phase.begun
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._ticks, name="progress", daemon=True)
            self._ticker.start()
        if not self._terminal:
            say(phase.label)
            return
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, mininterval=0.1, delay=1e-9)
        # a phase of one piece has no share to show: its seconds are what moves
        self._bar.bar_format = "{desc}{elapsed}" if phase.total <= 1 else None
        self._bar.unit, self._bar.unit_scale = ("B", True) if phase.bytes else ("it", False)
        self._bar.set_description(printable(phase.label), refresh=False)
        self._bar.initial = 0
        self._bar.reset(total=phase.total or None)
        self._bar.initial = phase.done  # made before the clock began: no part of the rate

    def _message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        say(text)

    def _ticks(self) -> None:
        while not self._ended.wait(1.0):
            self.tick()


@dataclass
class Phase:
    """What is going on: `done` of `total` pieces, or bytes if `total` is such; `begun` on the clock."""

    label: str
    done: int
    total: int
    begun: float

    @property
    def bytes(self) -> bool:
        return isinstance(self.total, Bytes)

    def line(self, now: float) -> str:
        """`weights unet: 45 %, 1.5 GB of 3.4 GB, 12 s, 15 s left`."""
        seconds = now - self.begun
        if self.total <= 1:
            return f"{self.label}: {seconds:.0f} s"
        shown = [size_text(count) if self.bytes else str(count) for count in (self.done, self.total)]
        share = f"{100 * self.done // self.total} %, {shown[0]} of {shown[1]}, {seconds:.0f} s"
        left = seconds * (self.total - self.done) / self.done if self.done else 0.0
        return f"{self.label}: {share}{f', {left:.0f} s left' if left >= 1 else ''}"


def note(message: str, quiet: bool = False) -> None:
    """One line for the reader of the log."""
    if not quiet:
        say(message)


def warn_of(source: Mapping[str, Any]) -> None:
    """Tell what of a source is left out, a line each."""
    for text in source.get("notes", ()):
        note(f"warning: {text}")


def say(line: str) -> None:
    """Print a line on stderr; if nobody reads it any more, the work goes on."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
