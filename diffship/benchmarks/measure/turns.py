"""Compared processes take turns, call by call: on a shared machine, what is compared must be measured side by side.

On two shared cores, pictures of one process varied by 15 %, much of it slow drift, which a ratio of neighbours cancels.
All of a set are loaded before the first turn; whoever is not called waits for a byte.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace

from diffship.benchmarks.measure.clock import TURNS
from diffship.benchmarks.measure.process import TIMEOUT_CODE, Measured, measure

REST_SECONDS = 0.05  # threads of the one before go on looking for work for some milliseconds
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """A command whose process takes turns (`clock.timed`); one that knows nothing of them just runs."""

    command: Sequence[str]
    env: Mapping[str, str]
    memory_limit: int | None = None


def take_turns(jobs: Sequence[Job], calls: int, seconds: float) -> list[Measured]:
    """Load the jobs one after the other, then let each call in turn, `calls` times; `seconds` is what each may take.

    A job's time is that of its load and of its own turns; one that has used it up is stopped, and the others go on.
    """
    players: list[_Player] = []
    try:
        for job in jobs:
            players.append(_Player(job, seconds, (len(jobs) + 1) * seconds))
            players[-1].wait()
        for _ in range(1 + calls):  # the first one is not timed
            for player in players:
                player.turn()
        for player in players:
            player.leave()
        return [player.result() for player in players]
    finally:
        for player in players:
            player.end()


class _Player:
    """One process and its two pipes: a byte tells it that it is its turn, a byte from it that it is ready again."""

    def __init__(self, job: Job, seconds: float, whole: float) -> None:
        self._left = seconds
        self._ours, self._go = os.pipe()
        self._done, self._over = os.pipe()
        self._process: subprocess.Popen[str] | None = None
        self._future: Future[Measured] = Future()
        self._plays = True
        self._thread = threading.Thread(target=self._run, args=(job, whole), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is ready, has ended, or its time is over."""
        begun = time.monotonic()
        while self._plays:
            if select.select([self._done], [], [], _LOOK_SECONDS)[0]:
                os.read(self._done, 1)
                break
            self._plays = not self._future.done()
            if time.monotonic() - begun > self._left:
                self._kill()
                self._plays = False
        self._left -= time.monotonic() - begun

    def turn(self) -> None:
        if self._plays:
            time.sleep(REST_SECONDS)
            os.write(self._go, b".")
            self.wait()

    def leave(self) -> None:
        """There are no more turns: it reports and ends."""
        self._plays = False
        os.close(self._go)
        self._go = -1

    def result(self) -> Measured:
        found = self._future.result()  # no timeout: `measure` ends it after its time
        return replace(found, code=TIMEOUT_CODE) if self._left <= 0 else found

    def end(self) -> None:
        """Close what is open, and stop the process if an interruption left it."""
        self._kill()
        self._thread.join(30)
        for pipe in (self._ours, self._go, self._done, self._over):
            if pipe >= 0:
                os.close(pipe)

    def _kill(self) -> None:
        if not self._future.done() and self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _run(self, job: Job, seconds: float) -> None:
        env = {**job.env, TURNS: f"{self._ours},{self._over}"}
        try:
            found = measure(
                job.command, seconds, env, job.memory_limit, keep=(self._ours, self._over), on_start=self._started
            )
            self._future.set_result(found)
        except BaseException as fault:
            self._future.set_exception(fault)

    def _started(self, process: subprocess.Popen[str]) -> None:
        self._process = process
