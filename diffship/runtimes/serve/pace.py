"""How fast a model is here, learnt from every request: what deadlines, queues and splits are judged by."""

from __future__ import annotations

from dataclasses import dataclass

from diffship.runtimes.serve.order import Order

_BLEND = 0.2  # weight of the newest measurement
_MOST = 2.0  # times the known pace that one measurement counts for: a stall is no pace


@dataclass
class Pace:
    """Seconds an image of one size: to encode, of a model call, to decode; 0 while nothing is known."""

    begin: float = 0.0
    call: float = 0.0
    end: float = 0.0

    def learn(self, name: str, seconds: float) -> None:
        known = getattr(self, name)
        if known:
            seconds = known + _BLEND * (min(seconds, _MOST * known) - known)
        setattr(self, name, seconds)


class Paces:
    """The pace of every size, by the shape of its latents. Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Pace] = {}

    def of(self, order: Order) -> Pace:
        return self._known.setdefault(order.shape, Pace())

    def seconds(self, order: Order) -> float:
        """What the whole of it takes."""
        begin = order.images * self.of(order).begin if order.encodes else 0.0
        return begin + self.seconds_left(order, order.images, order.images * order.calls)

    def seconds_left(self, order: Order, images: int, calls: int) -> float:
        """What is left once it is encoded: `calls` of all `images` together."""
        pace = self.of(order)
        return calls * pace.call + (images * pace.end if order.decodes else 0.0)

    def listed(self, factor: int) -> list[dict[str, float]]:
        """What has been measured, by size in pixels (`factor` a latent): ms an image to encode, a call, to decode."""
        return [
            {
                "width": shape[-1] * factor,
                "height": shape[-2] * factor,
                "begin_ms": round(1000 * pace.begin, 3),
                "call_ms": round(1000 * pace.call, 3),
                "end_ms": round(1000 * pace.end, 3),
            }
            for shape, pace in list(self._known.items())
            if pace.begin or pace.call or pace.end
        ]
