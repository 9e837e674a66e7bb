"""One picture on its way between two devices: what was asked, what it cost so far, how long the cloud may take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from diffship.runtimes.handoff.report import HandoffReport
from diffship.runtimes.handoff.transport import Answer, CloudError, CloudModel
from diffship.sampling.request import Request
from diffship.sampling.trajectory import Trajectory

MARGIN = 1.1  # a step is at times slower than the last ones were


@dataclass
class Pace:
    """Seconds that this device needed for pictures of one shape: to encode, for a call, to decode; None: unknown."""

    encode: float | None = None
    call: float | None = None
    decode: float | None = None

    def alone(self, calls: int) -> float | None:
        """For `calls` calls and the decoding, which counts as a call while it is unknown."""
        if self.call is None:
            return None
        return calls * self.call + (self.call if self.decode is None else self.decode)


@dataclass
class Work:
    """One picture: a settled request and its split; `begin` and `times` in seconds of the monotonic clock.

    `asked` is the number of calls that the cloud was asked for, the surplus of a sampler such as PNDM included.
    """

    request: Request
    split: tuple[int, int]
    begin: float
    pace: Pace
    asked: int = 0
    requests: int = 0
    retries: int = 0
    ignored: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    arrived: bool = False
    fallback: str | None = None
    model: CloudModel | None = None
    answer: Answer | None = None
    times: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def spare(self, deadline: float) -> float:
        """Seconds from the begin that the cloud may take; after them this device can still draw alone within
        `deadline`.

        Half of the deadline while it is not known how fast this device is. If this device alone would miss the
        deadline, the cloud gets the time that this device would need for the same calls, because a later answer saves
        nothing.
        """
        alone = self.pace.alone(sum(self.split))
        if alone is None or self.pace.call is None:
            return deadline / 2
        spare = deadline - MARGIN * alone
        return spare if spare > 0 else self.split[0] * self.pace.call

    def ignore(self, fault: CloudError) -> None:
        """Count a handoff whose answer is not used, whether it came or is still to come."""
        self.ignored += self.requests > 0 and fault.kind in ("slow", "garbage", "wrong")

    def report(self, begun: Trajectory, cloud: str, deadline: float) -> HandoffReport:
        """The account of a finished picture, which this device went on with from `begun`."""
        total, answer = time.monotonic() - self.begin, self.answer if self.fallback is None else None
        times = {name: 1000 * seconds for name, seconds in self.times.items()}
        made = begun.step if self.arrived else 0
        ahead = 0.0 if self.arrived else times.get("ahead", 0.0)
        return HandoffReport(
            cloud=cloud,
            model=None if self.model is None else self.model.name,
            asked_calls=self.asked or self.split[0],
            cloud_calls=made,
            edge_calls=begun.calls - made,
            fallback=self.fallback,
            total_ms=1000 * total,
            cloud_ms=times.get("cloud", 0.0),
            cloud_queue_ms=None if answer is None else answer.queue_ms,
            cloud_run_ms=None if answer is None else answer.run_ms,
            encode_ms=times["encode"],
            edge_ms=ahead + times["edge"],
            finish_ms=times["finish"],
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            requests=self.requests,
            retries=self.retries,
            ignored=self.ignored,
            deadline_ms=1000 * deadline,
            late_ms=1000 * max(total - deadline, 0.0),
            warnings=tuple(dict.fromkeys(self.warnings)),
        )
