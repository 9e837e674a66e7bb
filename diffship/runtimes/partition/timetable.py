"""Timetable: which stage computes which step, with which timestep, out of which boundary tensors. Pure data.

AsyncDiff (arXiv 2406.06911): after a warm-up in which one stage follows the other, all stages of a step run at once,
each on what its predecessors made in the round before. Steps and rounds count from 0, in the timesteps really used.

A step is one model call here, as in the published code: PNDM and Heun make more calls than their sampler has steps.
A warm-up counts calls too, and a call whose timestep is that of the call before is a step like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from diffship.core.errors import ConfigError
from diffship.core.strict import bounded, bounds
from diffship.runtimes.partition.placement import Link, Placement

STRIDES = (1, 2)


@dataclass(frozen=True)
@bounded
class Scheme:
    """How far stages run apart.

    stride 2: one round makes two predictions, the second one step ahead; it takes one more device, which holds the last
    stages once more. warm_up: steps that are exact. time_shift: after them every stage embeds the timestep before.
    """

    stride: int = field(default=1, metadata=bounds(1, 2))
    warm_up: int = field(default=1, metadata=bounds(1, 10_000))
    time_shift: bool = False

    def devices(self, stages: int) -> int:
        """How many devices `stages` stages take."""
        return stages + self.stride - 1


@dataclass(frozen=True, order=True)
class Made:
    """A boundary tensor as one device left it in one round."""

    round: int
    device: int
    tensor: str


@dataclass(frozen=True)
class Task:
    """One stage on one device: the latents of step `sample`, the timestep of step `time`, boundaries as they were made.

    `predicts` is the step whose prediction comes out of it, if any does.
    """

    device: int
    piece: int
    sample: int
    time: int
    reads: tuple[Made, ...]
    predicts: int | None = None


@dataclass(frozen=True)
class Round:
    """Tasks between two exchanges. In a synchronous round they run one after another, else all devices run at once."""

    step: int
    synchronous: bool
    tasks: tuple[Task, ...]

    @property
    def predicts(self) -> tuple[int, ...]:
        return tuple(sorted(task.predicts for task in self.tasks if task.predicts is not None))


@dataclass(frozen=True)
class Timetable:
    """`calls` steps of a placement. Raises ConfigError if a task reads what is not there or too old."""

    placement: Placement
    scheme: Scheme
    calls: int
    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ConfigError(f"the timetable does not hold: {faults[0]}")

    @property
    def devices(self) -> int:
        return 1 + max(task.device for each in self.rounds for task in each.tasks)

    @property
    def seats(self) -> list[tuple[int, int]]:
        """(device, piece) of everything that is ever run: what has to be loaded where."""
        return sorted({(task.device, task.piece) for each in self.rounds for task in each.tasks})

    @cached_property
    def by_step(self) -> tuple[int, ...]:
        """The round that makes the prediction of each step."""
        found = {step: i for i, each in enumerate(self.rounds) for step in each.predicts}
        return tuple(found[step] for step in range(self.calls))

    def sends(self, index: int) -> list[Link]:
        """What leaves each device in (synchronous) or after round `index`; each tensor once for a device; bytes 0."""
        found: dict[tuple[int, int], dict[str, None]] = {}
        for each in self.rounds[index : index + 2]:
            for task in each.tasks:
                for made in task.reads:
                    if made.round == index and made.device != task.device:
                        found.setdefault((made.device, task.device), {})[made.tensor] = None
        return [Link(*ends, tuple(names), 0) for ends, names in sorted(found.items())]

    def lag(self, step: int) -> int:
        """By how many steps the oldest latents in a prediction are older than that step."""
        oldest: dict[tuple[int, int, str], int] = {}
        for i, each in enumerate(self.rounds):
            for task in each.tasks:
                age = min([task.sample, *(oldest[made.round, made.device, made.tensor] for made in task.reads)])
                if task.predicts == step:
                    return step - age
                oldest |= {(i, task.device, name): age for name in self.placement.pieces[task.piece].writes}
        raise ConfigError(f"no round predicts step {step}; there are {self.calls}")

    def seconds(self, costs: Sequence[float]) -> float:
        """Time of all rounds if piece k takes `costs[k]`; what is sent is not in it."""
        total = 0.0
        for each in self.rounds:
            load = dict.fromkeys(range(self.devices), 0.0)
            for task in each.tasks:
                load[task.device] += costs[task.piece]
            total += sum(load.values()) if each.synchronous else max(load.values())
        return total

    def speed_up(self, costs: Sequence[float]) -> float:
        """Against one device that runs all stages of every step."""
        return self.calls * sum(costs) / self.seconds(costs)

    def _faults(self) -> Iterable[str]:
        made: set[Made] = set()
        for i, each in enumerate(self.rounds):
            fresh: set[Made] = set()
            for task in each.tasks:
                piece = self.placement.pieces[task.piece]
                yield from _task_faults(task, i, each, made, fresh)
                if {read.tensor for read in task.reads} != set(piece.reads):
                    yield f"{piece.name} of round {i} does not read what it takes"
                if not (0 <= task.time < self.calls and task.sample == each.step):
                    yield f"{piece.name} of round {i} stands at timestep {task.time} with latents of {task.sample}"
                fresh |= {Made(i, task.device, name) for name in piece.writes}
            made = fresh
        predicted = [step for each in self.rounds for step in each.predicts]
        if predicted != list(range(self.calls)):
            yield f"predictions come for steps {predicted}"


def timetable(placement: Placement, calls: int, scheme: Scheme | None = None) -> Timetable:
    """The timetable of `calls` steps; work that nothing reads later is left out.

    Raises:
        ConfigError: no step, or a time shift if nothing is stale.
    """
    scheme = scheme or Scheme()
    if calls < 1:
        raise ConfigError(f"calls is {calls}; a timetable has at least one step")
    alone = placement.devices == 1 and scheme.stride == 1
    if alone and scheme.time_shift:
        raise ConfigError("time_shift is for stages that lag behind; one stage on one device does not")
    warm = calls if alone else min(scheme.warm_up, calls)
    rounds = [_exact(placement, step) for step in range(warm)]
    for step in range(warm, calls, scheme.stride):
        rounds.append(_at_once(placement, scheme, step, len(rounds), calls))
    return Timetable(placement, scheme, calls, _without_idle(placement, rounds))


def _exact(placement: Placement, step: int) -> Round:
    last = len(placement.pieces) - 1
    tasks = []
    for i, piece in enumerate(placement.pieces):
        homes = ((placement.pieces[placement.writer[name]].home, name) for name in piece.reads)
        reads = tuple(Made(step, home, name) for home, name in homes)
        tasks.append(Task(piece.home, i, step, step, reads, step if i == last else None))
    return Round(step, True, tuple(tasks))


def _at_once(placement: Placement, scheme: Scheme, step: int, index: int, calls: int) -> Round:
    ahead, shift = scheme.stride - 1, int(scheme.time_shift)
    last, own = placement.devices - 1, range(placement.devices)
    # (device, whose stages it runs, step that it predicts for): the owners look ahead, the extra device does not
    rows = [(device, device, step + ahead) for device in own]
    rows += [(last + 1 + k, last, step + k) for k in range(ahead)]
    tasks = []
    for device, home, target in rows:
        time = min(target, calls - 1) - shift
        for i, piece in enumerate(placement.pieces):
            if piece.home == home:
                reads = tuple(_latest(placement, name, home, device, index) for name in piece.reads)
                final = i == len(placement.pieces) - 1 and target < calls
                tasks.append(Task(device, i, step, time, reads, target if final else None))
    return Round(step, False, tuple(tasks))


def _latest(placement: Placement, name: str, home: int, device: int, index: int) -> Made:
    """A device's own tensors are of this round; those of others came after the last one, from their owners."""
    source = placement.pieces[placement.writer[name]].home
    return Made(index, device, name) if source == home else Made(index - 1, source, name)


def _without_idle(placement: Placement, rounds: Sequence[Round]) -> tuple[Round, ...]:
    needed: set[Made] = set()
    kept: list[Round] = []
    for i in reversed(range(len(rounds))):
        tasks: list[Task] = []
        for task in reversed(rounds[i].tasks):
            written = {Made(i, task.device, name) for name in placement.pieces[task.piece].writes}
            if task.predicts is not None or written & needed:
                tasks.insert(0, task)
                needed.update(task.reads)
        kept.insert(0, replace(rounds[i], tasks=tuple(tasks)))
    return tuple(kept)


def _task_faults(task: Task, index: int, each: Round, made: set[Made], fresh: set[Made]) -> Iterable[str]:
    for read in task.reads:
        text = f"round {index} reads {read.tensor} of device {read.device} and round {read.round}"
        if read.round < index - 1:
            yield f"{text}: too old"
        elif read not in (fresh if read.round == index else made):
            yield f"{text}, which was not made"
        elif read.round == index and read.device != task.device and not each.synchronous:
            yield f"{text} while it is being made"
