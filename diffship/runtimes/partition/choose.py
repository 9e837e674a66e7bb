"""Which way of sharing a picture among devices is the fastest of those that keep a stated fidelity. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffship.core.errors import ConfigError
from diffship.runtimes.partition.forecast import WARM_UPS, PartitionProfile, Way, held, lacking, seconds, ways

FLOOR_DB = 30.0
SLOWER = "slower"


@dataclass(frozen=True)
class Candidate:
    """A way and what it would take: `seconds` of one picture, `bytes` of weights on the device that holds most of them.

    fidelity_db: PSNR to the sequential picture, infinite if nothing is stale; None if nobody had to know it. why: for
    what reason it was not taken; empty for the one that is.
    """

    way: Way
    seconds: float
    bytes: int
    fidelity_db: float | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite fidelity is null beside `exact`."""
        known = self.fidelity_db is not None and math.isfinite(self.fidelity_db)
        return {
            "way": self.way.text(),
            "stages": self.way.stages,
            "homes": list(self.way.homes),
            "stride": self.way.scheme.stride,
            "warm_up": self.way.scheme.warm_up,
            "halves": self.way.parts,
            "devices": self.way.devices,
            "exact": self.way.exact,
            "predicted_seconds": round(self.seconds, 6),
            "bytes": self.bytes,
            "fidelity_db": round(self.fidelity_db or 0.0, 2) if known else None,
            "why_not": self.why or None,
        }


@dataclass(frozen=True)
class Choice:
    """All candidates, the fastest first; exactly one of them was taken."""

    candidates: tuple[Candidate, ...]
    floor_db: float
    calls: int

    @property
    def taken(self) -> Candidate:
        return next(each for each in self.candidates if not each.why)


def choose(
    profile: PartitionProfile,
    calls: int,
    floor_db: float,
    fidelity: Callable[[Way], float],
    warm_ups: Sequence[int] = WARM_UPS,
) -> Choice:
    """The fastest way for a picture of `calls` model calls that fits and whose PSNR reaches `floor_db`.

    `fidelity` gives the PSNR of a way in dB. It is asked from the fastest way on until one reaches the floor, and never
    for a way in which nothing is stale. Of ways that take equally long, to the nanosecond, the one with fewer devices
    is taken, and then the one with the longer warm-up.

    Raises:
        ConfigError: no way both fits and reaches the floor.
    """
    every = [
        Candidate(way, seconds(profile, way, calls), max(held(profile, way)), math.inf if way.exact else None, SLOWER)
        for way in ways(profile, calls, warm_ups)
    ]
    every.sort(key=lambda each: (round(each.seconds, 9), each.way.devices, -each.way.scheme.warm_up))
    for place, each in enumerate(every):
        every[place] = judged = _judged(profile, each, floor_db, fidelity)
        if not judged.why:
            return Choice(tuple(every), floor_db, calls)
    told = "; ".join(f"{each.way.text()} {each.why}" for each in every[-3:])
    raise ConfigError(f"no way of sharing the picture fits and reaches {floor_db:g} dB: {told}")


def _judged(
    profile: PartitionProfile, candidate: Candidate, floor_db: float, fidelity: Callable[[Way], float]
) -> Candidate:
    """The candidate with its fidelity, and why it is not taken if it is not."""
    if why := lacking(profile, candidate.way):
        return replace(candidate, why=why)
    found = math.inf if candidate.way.exact else fidelity(candidate.way)
    why = "" if found >= floor_db else f"below {floor_db:g} dB"
    return replace(candidate, fidelity_db=found, why=why)
