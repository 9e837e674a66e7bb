"""Lanes: the jobs of one exchange, one for each device; in this thread one after another, or in a thread for each."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from diffship.core.errors import DeadlineError, RunnerError

_GOODBYE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """`label` names the stage in errors."""

    label: str
    call: Callable[[], Any]


class Lanes(Protocol):
    def __call__(self, jobs: Mapping[int, Job]) -> dict[int, Any]:
        """The result of every job, by device; the first fault is raised."""
        ...

    def close(self) -> None: ...


class OneByOne:
    """All devices in this thread."""

    def __call__(self, jobs: Mapping[int, Job]) -> dict[int, Any]:
        return {device: job.call() for device, job in jobs.items()}

    def close(self) -> None:
        """There is nothing to end."""


class ThreadEach:
    """A thread for each device. Jobs not done after `timeout` seconds are given up, and with them the lanes."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._workers: dict[int, _Worker] = {}
        self._why = ""

    def __call__(self, jobs: Mapping[int, Job]) -> dict[int, Any]:
        if self._why:
            raise RunnerError(f"no job is taken any more: {self._why}")
        futures = {device: self._worker(device).submit(job) for device, job in jobs.items()}
        done, late = wait(futures.values(), timeout=self._timeout, return_when=FIRST_EXCEPTION)
        for future in done:
            fault = future.exception(timeout=0)
            if fault is not None:
                self._settle(late)
                raise fault
        if late:
            names = "; ".join(jobs[device].label for device, future in futures.items() if future in late)
            self._why = f"no answer within {self._timeout:g} s from {names}"
            raise DeadlineError(self._why)
        return {device: future.result(timeout=0) for device, future in futures.items()}

    def close(self) -> None:
        """Ends the threads; one that hangs is left behind, and ends with the process."""
        self._why = self._why or "they were closed"
        for worker in self._workers.values():
            worker.end()
        deadline = time.monotonic() + (_GOODBYE_SECONDS if self._why == "they were closed" else 0.0)
        for worker in self._workers.values():
            worker.thread.join(max(0.0, deadline - time.monotonic()))

    def _settle(self, late: set[Future[Any]]) -> None:
        """One failed: the others are waited for, so that the next job finds its thread free."""
        if wait(late, timeout=self._timeout).not_done:
            self._why = f"a stage failed, and others did not end within {self._timeout:g} s"

    def _worker(self, device: int) -> _Worker:
        if device not in self._workers:
            self._workers[device] = _Worker(device)
        return self._workers[device]


class _Worker:
    """A daemon: a stage that never comes back must not keep the process."""

    def __init__(self, device: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=f"diffship device {device}", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future

    def end(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while True:
            # no timeout: close() ends it, or the process does
            item = self._jobs.get()
            if item is None:
                return
            job, future = item
            try:
                future.set_result(job.call())
            except BaseException as fault:  # also what would end a thread in silence
                future.set_exception(fault)
            del item, job, future  # the arrays in them go when they are taken, not with the next job
