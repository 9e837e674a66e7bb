"""What became of one picture that two devices shared: who made which calls, how long each took, what travelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffship.core.brief import brief
from diffship.core.strict import plain
from diffship.sampling.picture import Picture


@brief
@dataclass(frozen=True)
class HandoffReport:
    """Times in milliseconds on this device's clock, sizes in bytes of HTTP bodies.

    `asked_calls` are those that the split gave to the cloud, `cloud_calls` those that it made and this device went on
    from: all of them, or none. `fallback` is None, or why this device drew alone: a word of docs/handoff.md, a colon,
    the reason. `cloud_ms` is the wait for the cloud, of which the server says it queued `cloud_queue_ms` and drew
    `cloud_run_ms` (None: it did not say). `edge_ms` are the model calls here, `finish_ms` the decoding.
    `requests` counts handoffs that were sent, `retries` included; `ignored` those whose answer was not used, whether
    it was wrong or nobody waited for it any longer. `late_ms` is by how much the deadline was missed.
    """

    cloud: str
    model: str | None
    asked_calls: int
    cloud_calls: int
    edge_calls: int
    fallback: str | None
    total_ms: float
    cloud_ms: float
    cloud_queue_ms: float | None
    cloud_run_ms: float | None
    encode_ms: float
    edge_ms: float
    finish_ms: float
    bytes_up: int
    bytes_down: int
    requests: int
    retries: int
    ignored: int
    deadline_ms: float
    late_ms: float
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in plain(self).items()}

    def line(self) -> str:
        """One line for a person."""
        if self.fallback is not None:
            what = f"alone, {self.edge_calls} calls in {self.edge_ms:.0f} ms ({self.fallback})"
        elif not self.asked_calls:
            what = f"alone as asked, {self.edge_calls} calls in {self.edge_ms:.0f} ms"
        else:
            own = "" if self.cloud_run_ms is None else f" ({self.cloud_run_ms:.0f} ms of its time)"
            what = (
                f"cloud {self.model}: {self.cloud_calls} calls in {self.cloud_ms:.0f} ms{own}, "
                f"{self.bytes_down} bytes; here: {self.edge_calls} calls in {self.edge_ms:.0f} ms"
            )
        late = f"; {self.late_ms:.0f} ms past the deadline" if self.late_ms else ""
        return f"{what}; {self.total_ms:.0f} ms in all{late}"


@brief
@dataclass(frozen=True, eq=False)
class Hybrid:
    """One picture, and how it came about."""

    picture: Picture
    report: HandoffReport
