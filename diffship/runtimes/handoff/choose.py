"""How many calls the cloud should make: predicted cost of every split, and the one that a budget asks for. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffship.core.atomic import write_file
from diffship.core.document import read_json
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS, MIB
from diffship.core.strict import bounded, bounds, choices, load, plain

SCHEMA = 1
BUDGETS = ("cloud-ms", "quality", "latency")
_MS = bounds(0.0, 1e9)


@dataclass(frozen=True)
@bounded
class SplitProfile:
    """What one picture costs on both sides, measured; times in milliseconds.

    `cloud` and `edge` are the digests of the two models, `size` is (width, height) in pixels, `guided` whether a call
    computes two samples: a profile is of these alone. `*_begin_ms` is the encoding, `*_call_ms` one model call,
    `edge_end_ms` the decoding. A handoff moves `handoff_bytes` at `bytes_per_second`, after one `round_trip_ms`.
    """

    cloud: str
    edge: str
    size: tuple[int, int] = field(metadata=bounds(*LIMITS.size_px))
    guided: bool
    edge_begin_ms: float = field(metadata=_MS)
    edge_call_ms: float = field(metadata=_MS)
    edge_end_ms: float = field(metadata=_MS)
    cloud_begin_ms: float = field(metadata=_MS)
    cloud_call_ms: float = field(metadata=_MS)
    round_trip_ms: float = field(metadata=_MS)
    bytes_per_second: float = field(metadata=bounds(1.0, 1e15))
    handoff_bytes: int = field(metadata=bounds(0, 1 << 40))
    schema: int = field(default=SCHEMA, metadata=bounds(SCHEMA, SCHEMA))

    def cloud_ms(self, calls: int) -> float:
        """Time of the cloud for its first `calls` calls."""
        return self.cloud_begin_ms + calls * self.cloud_call_ms if calls else 0.0

    def link_ms(self) -> float:
        """Time on the network of one handoff."""
        return self.round_trip_ms + 1000 * self.handoff_bytes / self.bytes_per_second

    def latency_ms(self, calls: int, total: int) -> float:
        """Time until the picture of `total` calls is there; this device encodes while the cloud draws."""
        before = max(self.edge_begin_ms, self.cloud_ms(calls) + self.link_ms() if calls else 0.0)
        return before + (total - calls) * self.edge_call_ms + self.edge_end_ms


@dataclass(frozen=True)
@bounded
class QualityPoint:
    """A judge's figure of pictures whose first `cloud_calls` calls the cloud made; `low` to `high` is its interval."""

    cloud_calls: int = field(metadata=bounds(0, LIMITS.steps[1]))
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
@bounded
class QualityCurve:
    """A judge's figure against the split, as a benchmark measured it for one pair at one number of steps.

    `cloud` and `edge` are the digests of the two models; `better` says which way `metric` goes.
    """

    cloud: str
    edge: str
    steps: int = field(metadata=bounds(*LIMITS.steps))
    metric: str
    better: str = field(metadata=choices("higher", "lower"))
    points: tuple[QualityPoint, ...]
    schema: int = field(default=SCHEMA, metadata=bounds(SCHEMA, SCHEMA))

    def __post_init__(self) -> None:
        places = [point.cloud_calls for point in self.points]
        if places != sorted(set(places)) or len(places) < 2 or places[-1] > self.steps:
            raise ConfigError(f"points are at {places}; they rise, from 0 to {self.steps}, and are two or more")

    def at(self, calls: int) -> float | None:
        """The figure after `calls` calls of the cloud, linear between neighbours; None outside what was measured."""
        for left, right in pairwise(self.points):
            if left.cloud_calls <= calls <= right.cloud_calls:
                share = (calls - left.cloud_calls) / (right.cloud_calls - left.cloud_calls)
                return left.value + share * (right.value - left.value)
        return None

    def reaches(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.better == "higher" else value <= wanted

    def require_fit(self, cloud: str, edge: str, steps: int) -> None:
        """Raises ConfigError if it was measured for other models or another number of steps."""
        for what, ours, asked in (("cloud", self.cloud, cloud), ("edge", self.edge, edge)):
            if ours != asked:
                raise ConfigError(f"the quality curve is of another {what} model: {ours[:12]!a}, here is {asked[:12]}")
        if self.steps != steps:
            raise ConfigError(f"the quality curve is of {self.steps} steps, asked are {steps}: measure one for them")


@dataclass(frozen=True)
class Budget:
    """What a picture may cost or must reach; None is no bound. `cloud_ms` of the cloud's time, `latency_ms` until the
    picture is there, `quality` in the figure of the curve."""

    cloud_ms: float | None = None
    quality: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if self.cloud_ms is None and self.quality is None and self.latency_ms is None:
            raise ConfigError("there is no budget; give cloud-ms=X, quality=X or latency=SECONDS")


@dataclass(frozen=True)
class Choice:
    """A split and its predicted cost; `quality` is None without a curve, or if it was not measured."""

    split: tuple[int, int]
    cloud_ms: float
    latency_ms: float
    handoff_bytes: int
    quality: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in plain(self).items()}

    def line(self) -> str:
        quality = "" if self.quality is None else f", quality {self.quality:.4g}"
        return (
            f"split {self.split[0]},{self.split[1]}: {self.cloud_ms:.0f} ms of the cloud, "
            f"{self.latency_ms:.0f} ms in all, {self.handoff_bytes} bytes{quality}"
        )


def splits(
    profile: SplitProfile, steps: int, curve: QualityCurve | None = None, calls: int | None = None
) -> list[Choice]:
    """Every split of `steps` with its predicted cost, from all on this device to all on the cloud.

    The sampler makes `calls` in all (default: one a step); the surplus is of the side that ends the picture.
    """
    total, found = steps if calls is None else calls, []
    for share in range(steps + 1):
        on_cloud = total if share == steps else share
        cost = profile.cloud_ms(on_cloud), profile.latency_ms(on_cloud, total)
        quality = None if curve is None else curve.at(share)
        found.append(Choice((share, steps - share), *cost, profile.handoff_bytes if share else 0, quality))
    return found


def choose_split(
    profile: SplitProfile, steps: int, budget: Budget, curve: QualityCurve | None = None, calls: int | None = None
) -> Choice:
    """The split to draw with: of those that meet the budget, the one with the fewest calls of the cloud.

    If the budget says how much of the cloud's time may be spent (`cloud_ms`), it is the one with the most calls of the
    cloud, whose model is the better one. `calls` as in `splits`.

    Raises:
        ConfigError: `quality` without a curve for this pair; no split meets the budget: the best of each is named.
    """
    if budget.quality is not None and curve is None:
        raise ConfigError("a budget of quality needs the pair's quality curve: --quality-curve FILE")
    if curve is not None:
        curve.require_fit(profile.cloud, profile.edge, steps)
    every = splits(profile, steps, curve, calls)
    legal = [choice for choice in every if _meets(choice, budget, curve)]
    if not legal:
        raise ConfigError(_refusal(every, budget, curve))
    return legal[0] if budget.cloud_ms is None else legal[-1]


def read_curve(file: Path) -> QualityCurve:
    """Raises ConfigError: not readable, not JSON, or not of the form of `QualityCurve`."""
    return load(QualityCurve, read_json(file, MIB), str(file))


def read_profile(file: Path) -> SplitProfile:
    """Raises ConfigError: not readable, not JSON, or not of the form of `SplitProfile`."""
    return load(SplitProfile, read_json(file, MIB), str(file))


def write_profile(file: Path, profile: SplitProfile) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(plain(profile), indent=1) + "\n")


def _meets(choice: Choice, budget: Budget, curve: QualityCurve | None) -> bool:
    if budget.cloud_ms is not None and choice.cloud_ms > budget.cloud_ms:
        return False
    if budget.latency_ms is not None and choice.latency_ms > budget.latency_ms:
        return False
    if budget.quality is None or curve is None:
        return True
    return choice.quality is not None and curve.reaches(choice.quality, budget.quality)


def _refusal(every: list[Choice], budget: Budget, curve: QualityCurve | None) -> str:
    """What was asked, and the split that comes nearest in each figure that was asked for."""
    asked, best = [], []
    if budget.cloud_ms is not None:
        asked.append(f"cloud-ms={budget.cloud_ms:g}")
        best.append(f"the least of the cloud has {min(every, key=lambda choice: choice.cloud_ms).line()}")
    if budget.latency_ms is not None:
        asked.append(f"latency={budget.latency_ms / 1000:g}")
        best.append(f"the fastest is {min(every, key=lambda choice: choice.latency_ms).line()}")
    if budget.quality is not None and curve is not None:
        asked.append(f"quality={budget.quality:g}")
        sign = 1 if curve.better == "higher" else -1
        known = [choice for choice in every if choice.quality is not None]
        best.append(f"the best is {max(known, key=lambda choice: sign * (choice.quality or 0.0)).line()}")
    return f"no split meets {' and '.join(asked)}: {'; '.join(best)}"
