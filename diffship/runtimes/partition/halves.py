"""Halves: the negative and the positive rows of classifier-free guidance on two devices at once (CFG-parallel).

Rows of a batch do not mix, so nothing is stale and no warm-up is needed. It is what asynchronous stages are compared
with, and it combines with them: each half may be a partition of its own, on N devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffship.core.errors import ConfigError, DeadlineError, RunnerError
from diffship.core.kind import Kind
from diffship.core.runner import Runner
from diffship.runtimes.partition.lanes import Job, Lanes, OneByOne, ThreadEach
from diffship.sampling.guidance import guide, guided
from diffship.sampling.loop import Denoiser, plain
from diffship.sampling.trajectory import Trajectory

NEGATIVE, POSITIVE = 0, 1
NAMES = ("negative", "positive")
Array = Any


class Halves:
    """A Denoiser: `negative` computes the rows of the negative prompts, `positive` all others.

    The outputs are those of the two denoisers, guided as `sampling.guidance.guide` has it. They are bit for bit those
    of one denoiser that is asked for the two halves one after the other. A plain run asks for all rows in one call,
    where an engine may sum in another order: that differs in the last bits of float32.

    A trajectory without a second row (guidance of 1, or guidance as an input of the model) keeps one device busy. Both
    denoisers are the caller's; `close` ends the lanes alone. A context manager; not shared by threads.
    """

    def __init__(self, negative: Denoiser, positive: Denoiser, lanes: Lanes) -> None:
        self._denoisers = (negative, positive)
        self._lanes = lanes

    def __call__(self, batch: Sequence[Trajectory]) -> list[Array]:
        """The guided output of each trajectory.

        Raises:
            RunnerError, DeadlineError: a half failed, or did not answer in time; the message names it.
        """
        halves = {half: rows for half, rows in enumerate(split(batch)) if rows}
        made = both(self._lanes, {half: _call(self._denoisers[half], rows) for half, rows in halves.items()})
        return guide(batch, [*made.get(NEGATIVE, ()), *made[POSITIVE]])

    def close(self) -> None:
        self._lanes.close()

    def __enter__(self) -> Halves:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cfg_parallel(runners: Sequence[Runner], timeout: float | None = None, *, kind: Kind) -> Halves:
    """Two runners of one whole denoiser: the first gets the negative rows, the second the positive ones.

    kind: that of the model (`family.kind`). A `timeout` in seconds makes a thread for each runner; without one the
    halves follow each other in this thread.

    Raises:
        ConfigError: not two runners.
    """
    if len(runners) != len(NAMES):
        raise ConfigError(f"guidance has two halves, which take one runner each; got {len(runners)}")
    negative, positive = (plain(runner, kind) for runner in runners)
    return Halves(negative, positive, OneByOne() if timeout is None else ThreadEach(timeout))


def split(batch: Sequence[Trajectory]) -> tuple[list[Trajectory], list[Trajectory]]:
    """The rows of guidance as trajectories that have one row each: (negative prompts, everything else)."""
    negatives = [replace(each, guidance=1.0, positive=each.negative, negative=None) for each in batch if guided(each)]
    return negatives, [replace(each, guidance=1.0, negative=None) if guided(each) else each for each in batch]


def both(lanes: Lanes, calls: Mapping[int, Callable[[], Any]]) -> dict[int, Any]:
    """What each half's call gives, run on `lanes`; an error says which half it is of."""
    return lanes({half: Job(f"the {NAMES[half]} half", _named(NAMES[half], call)) for half, call in calls.items()})


def _call(denoiser: Denoiser, rows: Sequence[Trajectory]) -> Callable[[], Sequence[Array]]:
    return lambda: denoiser(rows)


def _named(half: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        try:
            return call()
        except Exception as fault:
            error = DeadlineError if isinstance(fault, DeadlineError) else RunnerError
            raise error(f"{half} half of guidance: {str(fault) or type(fault).__name__}") from fault

    return run
