"""Several models, one door: names, admission, idempotency, readiness, and the way to stop."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence

from diffship.core.errors import BusyError, ConfigError
from diffship.core.strict import unknown
from diffship.runtimes.serve.jobs import Clock, Generation, Kept, Listener
from diffship.runtimes.serve.metrics import Metrics
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import Order
from diffship.runtimes.serve.worker import BROKEN, READY, STOP_SECONDS, Served, Worker


class Service:
    """What an application asks; it knows no HTTP and no process. Threads may share it.

    The first model is the one of requests that name none.
    """

    def __init__(
        self, models: Sequence[Served], options: ServeOptions | None = None, clock: Clock = time.monotonic
    ) -> None:
        if not models or len({served.name for served in models}) != len(models):
            raise ConfigError("a service needs at least one model, and a name of its own for each")
        self.options = options or ServeOptions()
        self.metrics = Metrics()
        self.workers = {served.name: Worker(served, self.options, self.metrics, clock) for served in models}
        self.broken = threading.Event()
        self._clock = clock
        self._kept = Kept(self.options, clock)
        self._draining = False

    def start(self, on_ready: Callable[[], None] | None = None) -> None:
        """Load every model in its worker; `on_ready` is called, in a worker's thread, once all of them are.

        `broken` is set when a model does not load, or its worker meets a fault of our own.
        """

        def heard(worker: Worker) -> None:
            if worker.state == BROKEN:
                self.broken.set()
            elif on_ready is not None and all(other.state == READY for other in self.workers.values()):
                on_ready()

        for worker in self.workers.values():
            worker.start(heard)

    def worker(self, name: str | None) -> Worker:
        """Raises ConfigError, with the nearest legal name."""
        if name is None:
            return next(iter(self.workers.values()))
        if name not in self.workers:
            raise ConfigError(unknown("model", name, self.workers))
        return self.workers[name]

    def submit(
        self,
        worker: Worker,
        order: Order,
        key: str | None = None,
        content: bytes = b"",
        listener: Listener | None = None,
    ) -> Generation:
        """Accept a request, or find the one that came with the same key; `content` is what makes two requests equal.

        `listener` hears of every step of a fresh one, and of the rest of one that was known.

        Raises:
            BusyError: no capacity now.
            ConflictError: the key came with other content before.
        """
        if key is None:
            return self._accept(worker, order, listener)
        fresh: list[Generation] = []

        def accept() -> Generation:
            fresh.append(self._accept(worker, order, listener))
            return fresh[0]

        generation = self._kept.once(key, hashlib.sha256(content).digest(), accept)
        if not fresh and listener is not None:
            generation.listen(listener)
        return generation

    def ready(self) -> bool:
        return not self._draining and all(worker.ready() for worker in self.workers.values())

    def states(self) -> dict[str, str]:
        """State of each model; `missing` or `replaced` if its files are no longer those that it was opened with."""
        return {
            name: (worker.served.lost() if worker.state == READY else "") or worker.state
            for name, worker in self.workers.items()
        }

    def fault(self) -> Exception | None:
        """Why a model did not load."""
        return next((worker.fault for worker in self.workers.values() if worker.fault is not None), None)

    def page(self) -> str:
        """The metrics."""
        gauges: dict[tuple[str, str], float] = {}
        for name, worker in self.workers.items():
            gauges["diffship_waiting", name] = worker.waiting()
            gauges["diffship_running", name] = worker.running()
            gauges["diffship_ready", name] = worker.ready()
        return self.metrics.text(gauges)

    def drain(self, seconds: float, tick: float = 0.02) -> bool:
        """Take nothing new, refuse what waits, let what runs finish; whether it did within `seconds`."""
        self._draining = True
        for worker in self.workers.values():
            worker.drain()
        end = time.monotonic() + seconds
        while any(worker.running() for worker in self.workers.values()):
            if time.monotonic() >= end:
                return False
            time.sleep(tick)
        return True

    def close(self) -> None:
        """Stop every worker; all of them together have the time that one would."""
        end = time.monotonic() + STOP_SECONDS
        for worker in self.workers.values():
            worker.cut_off()
        for worker in self.workers.values():
            worker.stop(max(end - time.monotonic(), 0.0))

    def _accept(self, worker: Worker, order: Order, listener: Listener | None) -> Generation:
        name = worker.served.name
        deadline = self._clock() + (self.options.deadline if order.deadline is None else order.deadline)
        generation = Generation(name, order, deadline, self._clock, self._count)
        if listener is not None:
            generation.listen(listener)
        try:
            worker.submit(generation)
        except BusyError:
            self.metrics.count("diffship_refused_total", model=name)
            raise
        return generation

    def _count(self, generation: Generation) -> None:
        self.metrics.count("diffship_generations_total", model=generation.name, outcome=generation.state)
