"""Progress on stderr: one bar a stage on a terminal, one line a stage in a log, nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from diffship.cli.stops import raise_if_heard
from diffship.core.printable import printable
from diffship.core.streams import silence

Progress = Callable[[str, int, int], None]


class Stages(AbstractContextManager["Stages"]):
    """Called as `stages(label, done, total)`; a new label closes the bar before it."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._label = ""
        self._bar: Any = None

    def __call__(self, label: str, done: int, total: int) -> None:
        raise_if_heard()
        if self._quiet:
            return
        if label != self._label:
            self._begin(label, total)
        if self._bar is not None:
            self._bar.update(max(0, done - self._bar.n))

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _begin(self, label: str, total: int) -> None:
        self._end()
        self._label = label
        if not self._terminal:
            say(label)
            return
        from tqdm import tqdm

        self._bar = tqdm(total=total or None, desc=printable(label), file=sys.stderr, leave=True, dynamic_ncols=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def note(message: str, quiet: bool = False) -> None:
    """One line for the reader of the log."""
    if not quiet:
        say(message)


def warn_of(source: Mapping[str, Any]) -> None:
    """Tell what of a source is left out, a line each."""
    for text in source.get("notes", ()):
        note(f"warning: {text}")


def say(line: str) -> None:
    """On stderr, whose reader may be gone: the work goes on unheard."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
