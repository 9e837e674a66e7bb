"""How fast a model is here, learnt from every request: what deadlines, queues and splits are judged by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from diffship.runtimes.serve.order import Order

_BLEND = 0.2  # weight of the newest measurement
_MOST = 2.0  # a measurement counts for at most so many times the known pace, because a stall is no pace


def blended(known: float, seconds: float) -> float:
    """What is known after one more measurement; 0 is nothing."""
    return known + _BLEND * (min(seconds, _MOST * known) - known) if known else seconds


@dataclass
class Pace:
    """Seconds of one size: an image's encoding and decoding, and a model call by its rows; 0 while nothing is known.

    An image has two rows in a call with guidance, one without. A call of eight rows takes less than eight calls of one.
    """

    begin: float = 0.0
    end: float = 0.0
    calls: dict[int, float] = field(default_factory=dict)

    def learn_call(self, rows: int, seconds: float) -> None:
        self.calls[rows] = blended(self.calls.get(rows, 0.0), seconds)

    def call(self, rows: float) -> float:
        """Seconds of a call of `rows`. Between two measured numbers of rows it is linear; below the least it is that of
        the least; above the largest it grows in proportion."""
        known = sorted(self.calls.copy().items())  # the worker may be adding one
        at = bisect_left(known, (rows, 0.0))
        if not known or at == 0:
            return known[0][1] if known else 0.0
        below, least = known[at - 1]
        if at == len(known):
            return least * rows / below
        above, most = known[at]
        return least + (most - least) * (rows - below) / (above - below)


@dataclass(frozen=True)
class Work:
    """What is left of a request: `calls` for each of `images`, and whether it begins with text and ends in pictures."""

    order: Order
    images: int
    calls: int
    encodes: bool

    @classmethod
    def of(cls, order: Order) -> Work:
        """The whole of it."""
        return cls(order, order.images, order.calls, order.encodes)


Key = tuple[tuple[int, ...], tuple[str, ...]]  # shape of the latents, names of the ControlNets


class Paces:
    """The pace of every size, by the shape of its latents, and by the ControlNets that are computed in its calls.
    Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[Key, Pace] = {}

    def of(self, order: Order) -> Pace:
        return self._known.setdefault((order.shape, order.controls), Pace())

    def expected(self, order: Order) -> Pace:
        """What is known of an order: of ControlNets that were not drawn yet what pictures without them take, which is
        less, and not nothing."""
        own, plain = self.of(order), self._known.get((order.shape, ()), Pace())
        return Pace(own.begin or plain.begin, own.end or plain.end, own.calls or plain.calls)

    def seconds(self, works: Iterable[Work], batch: int) -> float:
        """Until all of it is done, `batch` images of a size sharing a call, and the sizes taking turns."""
        sizes: dict[Key, list[Work]] = {}
        for work in works:
            sizes.setdefault((work.order.shape, work.order.controls), []).append(work)
        return sum(self._of_a_size(together, batch) for together in sizes.values())

    def _of_a_size(self, works: list[Work], batch: int) -> float:
        pace = self.expected(works[0].order)
        around = sum(work.images * (work.encodes * pace.begin + work.order.decodes * pace.end) for work in works)
        images = sum(work.images * work.calls for work in works)  # one call each
        if not images:
            return around
        at_once = min(batch, sum(work.images for work in works if work.calls))
        calls = max(images / at_once, *(work.calls * work.images / min(batch, work.images) for work in works))
        rows = sum(work.images * work.calls * (1 + work.order.guided) for work in works)
        return around + calls * pace.call(rows / calls)

    def listed(self, factor: int) -> list[dict[str, float]]:
        """What has been measured, by size in pixels (`factor` a latent), in ms: an image's encoding and decoding, the
        model call of one image without and with guidance. Calls with ControlNets are left out: clients who judge a
        split by this list send none."""
        return [
            {
                "width": shape[-1] * factor,
                "height": shape[-2] * factor,
                "begin_ms": round(1000 * pace.begin, 3),
                "call_ms": round(1000 * pace.call(1), 3),
                "guided_call_ms": round(1000 * pace.call(2), 3),
                "end_ms": round(1000 * pace.end, 3),
            }
            for (shape, controls), pace in list(self._known.items())
            if not controls and (pace.begin or pace.calls or pace.end)
        ]
