"""One model's worker: takes requests between steps, makes the calls, encodes and decodes; one thread per model."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from diffship.core.errors import BusyError, DiffshipError, RunnerError, UnsupportedError
from diffship.runtimes.serve.admission import Busy, Crowd
from diffship.runtimes.serve.batcher import Batcher, Strand
from diffship.runtimes.serve.files import MISSING, ReplacedError
from diffship.runtimes.serve.jobs import Clock, Generation, Pixels, Progress
from diffship.runtimes.serve.metrics import Metrics
from diffship.runtimes.serve.options import DEADLINE_SECONDS, ServeOptions
from diffship.runtimes.serve.pace import Paces, blended
from diffship.runtimes.serve.preview import preview
from diffship.runtimes.serve.restarts import Restarts
from diffship.runtimes.serve.warm_up import warm_up
from diffship.sampling.generate import checked_denoiser
from diffship.sampling.guidance import guided
from diffship.sampling.model import Model

LOADING, READY, RESTARTING, BROKEN = "loading", "ready", "restarting", "broken"
DRAINING, STOPPED = "draining", "stopped"
LOG = logging.getLogger("diffship.serve")
STOP_SECONDS = 5.0  # what a stopping worker's call may still take
_KILLED_SECONDS = 2.0  # until a thread notices that its engine was ended
_LOAD_SECONDS = 5.0  # what a client waits before it asks again while the model loads
_LATE_SECONDS = 0.2  # how late a deadline may be noticed while nothing is drawn


@dataclass(frozen=True)
class Served:
    """A model under the name that requests use. `lost()`: what its files are (missing, replaced), empty while they are
    those that it was opened with; `loaded()` is called once all of them were read, and raises ReplacedError if one
    was replaced meanwhile. `previews`: decoding is cheap.

    If its engine has a process of its own: `alive()`: that has not died; `restart()` makes another; `kill()` ends it
    for good, also in the middle of a call.
    """

    name: str
    model: Model
    lost: Callable[[], str] = lambda: ""
    loaded: Callable[[], None] = lambda: None
    previews: bool = False
    engine: str = ""
    alive: Callable[[], bool] = lambda: True
    restart: Callable[[], None] = lambda: None
    kill: Callable[[], None] = lambda: None


class Worker:
    """Requests in, results out. `turn` is one round of the work, without any thread; `start` repeats it in one.

    Requests are taken in order of arrival, but one whose size has no room waits for its own kind only.
    """

    def __init__(
        self, served: Served, options: ServeOptions, metrics: Metrics | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.served = served
        self.state = LOADING
        self.fault: Exception | None = None
        self._paces = Paces()
        self._calling: float | None = None  # since when
        self._options = options
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._restarts = Restarts(options.restarts, clock)
        self._wake = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._running: dict[Generation, list[Strand]] = {}
        self._batcher: Batcher | None = None
        self._thread: threading.Thread | None = None

    # what any thread may call

    def start(self, on_change: Callable[[Worker], None] | None = None) -> None:
        """Load the model and work in a thread of its own; `on_change` hears there that it is ready, or broken."""
        self._thread = threading.Thread(target=self._run, args=(on_change,), name=f"worker-{self.served.name}")
        self._thread.daemon = True  # a call that hangs must not keep a stopped server alive
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Put it in the queue.

        Raises:
            BusyError: loading, stopping, full, or too late for its deadline by what the queue needs.
        """
        with self._wake:
            self._require_room(generation)
            self._waiting.append(generation)
            self._wake.notify_all()

    def waiting(self) -> int:
        with self._wake:
            return sum(not generation.ended for generation in self._waiting)

    def running(self) -> int:
        return sum(not generation.ended for generation in list(self._running))

    def backlog(self) -> float:
        """Seconds until all that is here is done, by the pace so far; 0 while nothing is known."""
        with self._wake:
            return self._crowd().seconds(self._paces, self._options.batch)

    def paces(self) -> list[dict[str, float]]:
        """What has been measured, by size."""
        return self._paces.listed(self.served.model.family.vae_factor)

    def ready(self) -> bool:
        """Loaded, its files still there, and no call that takes longer than any deadline.

        Files that were replaced change nothing while the engine lives: it has read those that it was started with.
        """
        since = self._calling
        hangs = since is not None and self._clock() - since > DEADLINE_SECONDS[1]
        return self.state == READY and not hangs and self.served.alive() and self.served.lost() != MISSING

    def drain(self) -> None:
        """Take nothing new, refuse what waits; what runs goes on."""
        with self._wake:
            self.state = DRAINING if self.state in (LOADING, READY, RESTARTING) else self.state
            refused, self._waiting = list(self._waiting), deque()
            self._wake.notify_all()
        for generation in refused:
            generation.fail(BusyError("the server is stopping; ask another, or later"))

    def cut_off(self) -> None:
        """Fail what runs, and end the thread after the call it is in."""
        self.drain()
        with self._wake:
            self.state = STOPPED
            self._wake.notify_all()
        for generation in list(self._running):
            generation.fail(BusyError("the server stopped before it was done"))

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Cut off what runs and free the model; a call that goes on for longer than `timeout` ends with its engine."""
        self.cut_off()
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            LOG.error("%s: its engine does not answer; it is ended", self.served.name)
            self.served.kill()
            self._thread.join(_KILLED_SECONDS)

    # what the worker's thread does

    def load(self) -> None:
        """Open every part and call it once, which also fills the engine's caches.

        Raises:
            UnsupportedError: a model that fills masks.
            RunnerError: what the engine says.
        """
        model = self.served.model
        if model.family.unet_channels != model.family.latent_channels:
            raise UnsupportedError(f"{self.served.name} fills masks; serve draws from prompts alone")
        denoiser = checked_denoiser(model)
        warm_up(model, denoiser)
        self.served.loaded()
        self._batcher = Batcher(denoiser, self._options.batch)
        self._become(READY, LOADING)

    def turn(self) -> bool:
        """Drop what has ended, take what has room, make one model call, hand out what is done.

        False if there was nothing to do.
        """
        if not self.served.alive():
            self._revive()
        self._drop()
        taken = self._take()
        moved = self._call() if self.served.alive() else []
        for generation in dict.fromkeys(strand.owner for strand in moved):
            self._after_call(generation)
        return self._finish_arrived() or bool(taken or moved)

    def _run(self, on_change: Callable[[Worker], None] | None) -> None:
        heard = on_change or (lambda worker: None)
        try:
            self.load()
            heard(self)
            while self._wait():
                self.turn()
        except Exception as fault:
            if self.state != STOPPED:  # else it is what being stopped did to it
                self._break(fault)
                heard(self)
        self.served.model.close()

    def _revive(self) -> None:
        """Have another engine process, not too often; until then nothing new is taken.

        What was in the call that it died of has failed; what else was under way goes on, as it lies in this process.
        """
        LOG.error("%s: its engine's process is gone; another is started", self.served.name)
        self._become(RESTARTING, READY)
        while not self.served.alive() and self._until_due():
            self._restarts.note()
            self._metrics.count("diffship_restarts_total", model=self.served.name)
            try:
                self.served.restart()
            except ReplacedError:  # what is under way was begun with other weights
                self.served.kill()
                raise
            except (DiffshipError, OSError, MemoryError) as fault:  # no process, no memory: there may be later
                LOG.error("%s does not start again: %s", self.served.name, fault)
        if self.served.alive():
            self._become(READY, RESTARTING)

    def _until_due(self) -> bool:
        """Wait for the next start, while deadlines pass; False when there will be none."""
        while self.state != STOPPED and (left := self._restarts.wait()) > 0:
            self._drop()
            with self._wake:
                if self.state != STOPPED:
                    self._wake.wait(min(left, _LATE_SECONDS))
        return self.state != STOPPED

    def _become(self, state: str, before: str) -> None:
        with self._wake:
            self.state = state if self.state == before else self.state

    def _break(self, fault: Exception) -> None:
        """Neither a request nor the model is at fault: whoever supervises the process starts it anew."""
        expected = isinstance(fault, DiffshipError)  # its message says all that there is to know
        LOG.error("%s is broken: %s", self.served.name, fault, exc_info=None if expected else fault)
        with self._wake:
            self.state, self.fault = BROKEN, fault
            left = [*self._waiting, *self._running]
        for generation in left:
            generation.fail(BusyError("the model's worker broke down; ask another server, or later"))

    def _wait(self) -> bool:
        """Until there is work; False when there will be none."""
        with self._wake:
            while self.served.alive() and not (self._waiting or self._running or self.state in (STOPPED, BROKEN)):
                self._wake.wait(1.0)
            return self.state not in (STOPPED, BROKEN)

    def _require_room(self, generation: Generation) -> None:
        """Raises BusyError with what the client should know; holds the lock."""
        if self.state != READY:
            raise Busy(f"the model is {self.state}; ask again later", _LOAD_SECONDS)
        self._crowd().require_room(generation, self._paces, self._options)

    def _crowd(self) -> Crowd:
        return Crowd.of(self._waiting, self._running)

    def _drop(self) -> None:
        """Forget what was cancelled, and what is late."""
        with self._wake:
            for generation in (*self._waiting, *self._running):
                if generation.seconds_left() <= 0:
                    generation.expire()
            self._waiting = deque(generation for generation in self._waiting if not generation.ended)
        for generation in [generation for generation in self._running if generation.ended]:
            self._forget(generation)

    def _take(self) -> list[Generation]:
        """Take the requests for which there is room, in order of arrival, and encode each."""
        taken: list[Generation] = []
        at_once = 0  # what needs no call takes no room; without a bound it could hold up what runs
        while at_once < self._options.batch and self.served.alive() and (generation := self._next()) is not None:
            taken.append(generation)
            at_once += all(strand.arrived for strand in self._begin(generation))
        return taken

    def _next(self) -> Generation | None:
        batcher = self._opened()
        with self._wake:
            full: set[tuple[int, ...]] = set()
            for generation in self._waiting:
                shape = generation.order.shape
                if generation.ended or shape in full:
                    continue
                room = batcher.room(shape)
                if room < min(generation.order.images, self._options.batch):
                    full.add(shape)  # those behind it do not overtake their own kind
                    continue
                self._waiting.remove(generation)
                self._running[generation] = []
                return generation
        return None

    def _begin(self, generation: Generation) -> list[Strand]:
        """Encode; none if that fails."""
        since, order = self._clock(), generation.order
        generation.begin()
        if generation.ended:  # since it was taken; of such an order nothing is left
            self._forget(generation)
            return []
        try:
            trajectories = order.begin(self.served.model)
        except Exception as fault:
            self._fail(generation, fault)
            return []
        if order.encodes:
            pace = self._paces.of(order)
            pace.begin = blended(pace.begin, (self._clock() - since) / len(trajectories))
        strands = [Strand(made, order.goal(made), generation, place) for place, made in enumerate(trajectories)]
        self._running[generation] = strands
        self._opened().add(strand for strand in strands if not strand.arrived)
        generation.progress(_progress(strands))
        return strands

    def _call(self) -> list[Strand]:
        self._calling = since = self._clock()
        moved = self._opened().step()
        self._calling = None
        if moved:
            seconds = self._clock() - since
            if self.served.alive() and all(strand.fault is None for strand in moved):  # else it is no pace
                rows = sum(1 + guided(strand.trajectory) for strand in moved)
                self._paces.of(moved[0].owner.order).learn_call(rows, seconds)
            self._metrics.observe("diffship_model_call_images", len(moved), model=self.served.name)
            self._metrics.observe("diffship_model_call_seconds", seconds, model=self.served.name)
        return moved

    def _after_call(self, generation: Generation) -> None:
        strands = self._running.get(generation, [])
        fault = next((strand.fault for strand in strands if strand.fault is not None), None)
        if fault is not None:
            self._fail(generation, fault)
        elif not generation.ended:
            generation.progress(_progress(strands, self._previews(generation, strands)))

    def _finish_arrived(self) -> bool:
        """Decode what has made its calls; what an engine that dies meanwhile leaves waits for the next one."""
        arrived = [generation for generation, strands in self._running.items() if all(s.arrived for s in strands)]
        for generation in arrived:
            if not self.served.alive():
                break
            self._finish(generation)
        return bool(arrived)

    def _finish(self, generation: Generation) -> None:
        since, strands = self._clock(), self._running[generation]
        try:
            if not generation.ended:
                drawn = generation.order.end(self.served.model, [strand.trajectory for strand in strands])
                generation.finish(drawn)
                if generation.order.decodes:
                    pace = self._paces.of(generation.order)
                    pace.end = blended(pace.end, (self._clock() - since) / len(strands))
        except Exception as fault:
            self._fail(generation, fault)
        else:
            self._forget(generation)

    def _fail(self, generation: Generation, fault: Exception) -> None:
        if not isinstance(fault, DiffshipError) or isinstance(fault, RunnerError):
            LOG.error("%s: a request failed", self.served.name, exc_info=fault)
        generation.fail(fault)
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        self._opened().remove(generation)
        self._running.pop(generation, None)
        generation.release()

    def _previews(self, generation: Generation, strands: Iterable[Strand]) -> tuple[Pixels, ...]:
        every = generation.order.previews
        if not every:
            return ()
        due = [s.trajectory for s in strands if s.trajectory.step % every == 0 and not s.arrived]
        shown = [preview(self.served.model, trajectory) for trajectory in due]
        return tuple(pixels for pixels in shown if pixels is not None)

    def _opened(self) -> Batcher:
        if self._batcher is None:
            raise RunnerError(f"{self.served.name} is not loaded")
        return self._batcher


def _progress(strands: Iterable[Strand], previews: tuple[Pixels, ...] = ()) -> Progress:
    """The slowest image's; all of a request's images share their calls unless the batch is smaller than they are."""
    last = min(strands, key=lambda strand: strand.trajectory.step)
    return Progress(last.trajectory.step, last.trajectory.calls, previews)
