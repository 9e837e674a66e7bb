"""How fast a model is here, learnt from every request: what deadlines, queues and splits are judged by."""

from __future__ import annotations

from dataclasses import dataclass

_BLEND = 0.2  # weight of the newest measurement


@dataclass
class Pace:
    """Seconds an image of one size: to encode, of a model call, to decode; 0 while nothing is known."""

    begin: float = 0.0
    call: float = 0.0
    end: float = 0.0

    def learn(self, name: str, seconds: float) -> None:
        known = getattr(self, name)
        setattr(self, name, known + _BLEND * (seconds - known) if known else seconds)

    def seconds(self, images: int, calls: int) -> float:
        return images * (self.begin + calls * self.call + self.end)
