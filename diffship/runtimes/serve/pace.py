"""How fast a model is here, learnt from every request: what deadlines, queues and splits are judged by."""

from __future__ import annotations

from dataclasses import dataclass

from diffship.runtimes.serve.order import Order

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


class Paces:
    """The pace of every size, by the shape of its latents. Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Pace] = {}

    def of(self, order: Order) -> Pace:
        return self._known.setdefault(order.shape, Pace())

    def seconds(self, order: Order) -> float:
        """What the whole of it takes."""
        return self.of(order).seconds(order.images, order.calls)

    def listed(self, factor: int) -> list[dict[str, float]]:
        """What has been measured, by size in pixels (`factor` a latent): ms an image to encode, of a call, to end."""
        return [
            {
                "width": shape[-1] * factor,
                "height": shape[-2] * factor,
                "begin_ms": round(1000 * pace.begin, 3),
                "call_ms": round(1000 * pace.call, 3),
                "end_ms": round(1000 * pace.end, 3),
            }
            for shape, pace in list(self._known.items())
            if pace.begin
        ]
