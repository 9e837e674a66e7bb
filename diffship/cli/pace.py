"""What a run took: seconds to load, seconds a picture, memory; told in one line and in the document."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from diffship.cli.output import size_text
from diffship.core.memory import peak_bytes
from diffship.sampling.model import Model


@dataclass(frozen=True)
class Told:
    """Seconds on the clock: all of the command, of which `load` opened models and their parts; the rest a picture."""

    seconds: float
    load: float
    picture: float
    peak_bytes: int | None

    def to_json(self) -> dict[str, object]:
        return {
            "seconds": round(self.seconds, 3),
            "load_seconds": round(self.load, 3),
            "picture_seconds": round(self.picture, 3),
            "peak_host_bytes": self.peak_bytes,
        }

    def line(self, engines: Sequence[str], pictures: int) -> str:
        """`onnxruntime: loaded in 0.8 s, 4 pictures at 1.2 s each, peak memory 410.0 MB`."""
        many = "1 picture in" if pictures == 1 else f"{pictures} pictures at"
        each = "" if pictures == 1 else " each"
        peak = "" if self.peak_bytes is None else f", peak memory {size_text(self.peak_bytes)}"
        names = ", ".join(dict.fromkeys(engines))
        return f"{names}: loaded in {self.load:.1f} s, {many} {self.picture:.2f} s{each}{peak}"


class Pace:
    """A clock that starts when it is made, and tells loading from drawing."""

    def __init__(self) -> None:
        self._begun = self._opened = time.perf_counter()

    def opened(self) -> None:
        """The models are open; their parts are loaded when they are first used."""
        self._opened = time.perf_counter()

    def told(self, models: Sequence[Model], pictures: int) -> Told:
        now = time.perf_counter()
        parts = sum(float(getattr(model, "load_seconds", 0.0)) for model in models)
        drawing = max(now - self._opened - parts, 0.0)
        return Told(now - self._begun, self._opened - self._begun + parts, drawing / pictures, peak_bytes())
