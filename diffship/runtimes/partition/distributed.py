"""The executor over several processes: rank 0 draws and asks, every rank computes its own stages of the timetable.

Rank 0 alone has the sampler, so noise and history need not be kept in step: it sends each rank the latents and the
timestep of every round, and gets predictions back. Boundary tensors go from rank to rank and never through it. Only
tensors are sent; what they mean follows from the timetable, which every rank makes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError, PeerError
from diffship.core.kind import Kind
from diffship.core.runner import Handle, Runner
from diffship.core.spec import TensorSpec
from diffship.runtimes.partition.denoiser import follows, remembered
from diffship.runtimes.partition.desk import Desk
from diffship.runtimes.partition.halves import NAMES, split
from diffship.runtimes.partition.placement import Placement
from diffship.runtimes.partition.ranks import Ranks
from diffship.runtimes.partition.timetable import Scheme, Timetable
from diffship.sampling.guidance import FeedMaker, guide, guided
from diffship.sampling.sampler import times_of
from diffship.sampling.trajectory import Trajectory, as_numpy

Array = NDArray[Any]
BEGIN, ROUND, LEAVE, END = 1, 2, 3, 4  # the first number of a header
_HEADER, _SHAPES, _FEED, _PREDICTION, _CONSTANT = 1, 2, 3, 4, 5  # tags
_MOST_AXES = 6
_MOST_BYTES = 4 << 30  # of what a rank receives at the beginning of a run


@dataclass(frozen=True)
class Team:
    """What every rank knows before it begins. `inputs` are those of the whole denoiser, `boundaries` all tensors
    between stages, `runners` (by stage) the stages of this rank, `parts` 2 if the halves of guidance are apart.

    Ranks 0, 1, ... are the devices of the negative half, and then those of the positive one; without halves there is
    one row of devices.
    """

    ranks: Ranks
    placement: Placement
    scheme: Scheme
    inputs: tuple[TensorSpec, ...]
    boundaries: Mapping[str, TensorSpec]
    runners: Mapping[int, Runner]
    kind: Kind
    parts: int = 1

    def __post_init__(self) -> None:
        needed = ranks_needed(self.placement, self.scheme, self.parts)
        if self.ranks.size != needed:
            raise ConfigError(too_many(self.ranks.size, needed))

    @property
    def devices(self) -> int:
        """Ranks of one half."""
        return self.scheme.devices(self.placement.devices)

    @property
    def device(self) -> int:
        """Which device of its half this rank is."""
        return self.ranks.rank % self.devices

    @property
    def first(self) -> int:
        """The first rank of this rank's half."""
        return self.ranks.rank - self.device

    def desk(self, calls: int, shapes: Mapping[str, tuple[int, ...]]) -> Desk:
        """This rank's desk for a run of `calls` steps on inputs of these shapes."""
        table = remembered(self.placement, calls, self.scheme)
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name in shapes and not spec.per_sample:
                sizes = spec.bind(shapes[spec.name], sizes)
        return Desk(self.ranks, self.first, table, self.device, self.runners, self.boundaries, sizes)


def ranks_needed(placement: Placement, scheme: Scheme, parts: int) -> int:
    """How many ranks a partition takes."""
    return parts * scheme.devices(placement.devices)


def too_many(size: int, needed: int) -> str:
    return f"{size} processes run together, and these stages take {needed}; start them with --nproc-per-node {needed}"


class Distributed:
    """A Denoiser, on rank 0. It follows one batch at a time, all at one step; `end` sends the other ranks home."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._rows = [_Rows(team, part * team.devices) for part in range(team.parts)]

    def __call__(self, batch: Sequence[Trajectory]) -> list[Any]:
        """The guided output of each trajectory.

        Raises:
            ConfigError: the trajectories are not at one step.
            PeerError: a rank went away or did not answer in time. RunnerError: a stage of this rank failed.
        """
        halves = split(batch) if self._team.parts == len(NAMES) else [batch]
        pairs = [(rows, half) for rows, half in zip(self._rows, halves, strict=True) if half]
        for rows, half in pairs:
            rows.ask(half)
        made = [rows.answer() for rows, _ in pairs]
        if self._team.parts == 1:
            return guide(batch, made[0])
        return guide(batch, np.concatenate(made))

    def end(self) -> None:
        """Every rank leaves its loop."""
        for rows in self._rows:
            rows.stop(END)


@dataclass
class _Rows:
    """The rows of one half, or all rows: a run on the ranks from `first` on."""

    team: Team
    first: int
    _desk: Desk | None = None
    _table: Timetable | None = None
    _before: tuple[Trajectory, ...] = ()
    _begin: int = 0
    _index: int = -1
    _ready: dict[int, Array] = field(default_factory=dict)
    _kept: Mapping[int, Mapping[str, Handle]] = field(default_factory=dict)
    _feeds: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    _going: list[Callable[[], None]] = field(default_factory=list)

    def ask(self, batch: Sequence[Trajectory]) -> None:
        """Send what the round of this step needs, unless its prediction is there already."""
        made = FeedMaker(_Port(self.team.inputs), self.team.kind)(batch)
        whole = {name: np.ascontiguousarray(as_numpy(array)) for name, array in made.items()}
        if not (self._table is not None and follows(self._before, batch)):
            self._start(batch, whole)
        self._before = tuple(batch)
        table = self._current()
        if self._step not in self._ready:
            self._index = table.by_step[self._step]
            for device, time in self._times(batch).items():
                self._ask_one(device, time, whole)

    def answer(self) -> Array:
        """The prediction of the step that was asked for, float32, a row each."""
        if self._step not in self._ready:
            coming = self._expected()
            if self._desk is not None:
                self._ready |= self._desk.play(self._index, self._feeds)
            self._ready |= {step: finish() for step, finish in coming.items()}
            self._finish_sending()
        return self._ready.pop(self._step)

    def stop(self, operation: int) -> None:
        """Tell every rank of this half that the run is over (LEAVE), or everything is (END)."""
        if self._table is None and operation == LEAVE:
            return
        for rank in self._others():
            self._header(rank, operation)
        if self._desk is not None:
            self._desk.leave()
        self._finish_sending()
        self._table, self._desk, self._ready = None, None, {}

    @property
    def _step(self) -> int:
        return self._before[0].step - self._begin

    def _current(self) -> Timetable:
        assert self._table is not None  # between `_start` and `stop`
        return self._table

    def _start(self, batch: Sequence[Trajectory], whole: Mapping[str, Array]) -> None:
        at = {(trajectory.step, trajectory.calls) for trajectory in batch}
        if len(at) != 1:
            raise ConfigError(f"a partitioned batch stands at one step; these stand at (step, calls) {sorted(at)}")
        self.stop(LEAVE)
        ((self._begin, total),) = at
        calls = total - self._begin
        self._table = remembered(self.team.placement, calls, self.team.scheme)
        shapes = {name: array.shape for name, array in whole.items()}
        for rank in self._others():
            self._header(rank, BEGIN, calls)
            self._send(rank, _packed(self.team.inputs, shapes), _SHAPES, "shapes")
            for name in _constants(self.team, whole):
                self._send(rank, whole[name], _CONSTANT, name)
        if self.team.first == self.first:
            self._desk = self.team.desk(calls, shapes)
            self._kept = _kept(self.team, {name: whole[name] for name in _constants(self.team, whole)})

    def _times(self, batch: Sequence[Trajectory]) -> dict[int, Array]:
        """The timestep of every row, by device; one without a stage in this round is told of it nevertheless."""
        rows = [*(trajectory for trajectory in batch if guided(trajectory)), *batch]
        each = self._current().rounds[self._index]
        steps = dict.fromkeys(range(self.team.devices), self._begin + each.step)
        steps |= {task.device: self._begin + task.time for task in each.tasks}
        return {
            device: np.array([times_of(row.sampler, row.steps)[step] for row in rows], np.float32)
            for device, step in sorted(steps.items())
        }

    def _ask_one(self, device: int, time: Array, whole: Mapping[str, Array]) -> None:
        kind, rank = self.team.kind, self.first + device
        if rank == self.team.ranks.rank:
            changing = {kind.sample_input: whole[kind.sample_input], kind.time_input: time}
            self._feeds = _feeds(self.team, changing, self._kept)
            return
        self._header(rank, ROUND, self._index)
        sample = whole[kind.sample_input].astype(np.float32, copy=False)
        self._send(rank, np.concatenate([time, sample.reshape(-1)]), _FEED, "latents")

    def _expected(self) -> dict[int, Callable[[], Array]]:
        """Receives of the predictions that other ranks make in this round."""
        rows = len(self._before) + sum(map(guided, self._before))
        shape = (rows, *self._before[0].latents.shape)
        found = {}
        for task in self._current().rounds[self._index].tasks:
            rank = self.first + task.device
            if task.predicts is not None and rank != self.team.ranks.rank:
                buffer = np.empty(shape, np.float32)
                what = f"the prediction of step {task.predicts + 1}"
                found[task.predicts] = self.team.ranks.expect(rank, buffer, _PREDICTION, what)
        return found

    def _others(self) -> Iterator[int]:
        ranks = range(self.first, self.first + self.team.devices)
        return (rank for rank in ranks if rank != self.team.ranks.rank)

    def _header(self, rank: int, operation: int, value: int = 0) -> None:
        self._send(rank, np.array([operation, value], np.int64), _HEADER, "what to do")

    def _send(self, rank: int, array: Array, tag: int, what: str) -> None:
        self._going.append(self.team.ranks.send(rank, array, tag, what))

    def _finish_sending(self) -> None:
        going, self._going = self._going, []
        for finish in going:
            finish()


def work(team: Team) -> None:
    """What every rank but the first does: compute its stages of each round until rank 0 says that all is over.

    Raises:
        PeerError: a rank went away or did not answer in time. RunnerError: a stage of this rank failed.
    """
    desk: Desk | None = None
    kept: Mapping[int, Mapping[str, Handle]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    while True:
        operation, value = team.ranks.expect(0, np.empty(2, np.int64), _HEADER, "what to do")().tolist()
        if operation == BEGIN:
            shapes, constants = _begun(team)
            kept = _kept(team, constants)
            desk = team.desk(value, shapes)
        elif desk is not None and operation == ROUND:
            _round(team, desk, value, kept, shapes[team.kind.sample_input])
        elif operation in (LEAVE, END):
            if desk is not None:
                desk.leave()
            desk = None
            if operation == END:
                return
        else:
            raise PeerError(f"rank 0 sent operation {operation}, which is not due here")


def _begun(team: Team) -> tuple[dict[str, tuple[int, ...]], dict[str, Array]]:
    """Shapes of the inputs, and those inputs that stay the same for a whole run."""
    packed = team.ranks.expect(0, np.empty((len(team.inputs), 1 + _MOST_AXES), np.int64), _SHAPES, "shapes")()
    shapes = _unpacked(team.inputs, packed)
    constants = {}
    for name in _constants(team, shapes):
        constants[name] = team.ranks.expect(0, np.empty(shapes[name], np.float32), _CONSTANT, name)()
    return shapes, constants


def _round(
    team: Team, desk: Desk, index: int, kept: Mapping[int, Mapping[str, Handle]], shape: tuple[int, ...]
) -> None:
    kind = team.kind
    feed = np.empty(shape[0] + int(np.prod(shape)), np.float32)
    team.ranks.expect(0, feed, _FEED, "latents")()
    changing = {kind.time_input: feed[: shape[0]], kind.sample_input: feed[shape[0] :].reshape(shape)}
    for step, prediction in desk.play(index, _feeds(team, changing, kept)).items():
        what = f"the prediction of step {step + 1}"
        team.ranks.send(0, prediction.astype(np.float32, copy=False), _PREDICTION, what)()


def _constants(team: Team, known: Mapping[str, Any]) -> list[str]:
    """Inputs that stay the same for a whole run: conditions, and guidance if the model takes it."""
    changing = (team.kind.sample_input, team.kind.time_input)
    return [spec.name for spec in team.inputs if spec.name in known and spec.name not in changing]


def _kept(team: Team, constants: Mapping[str, Array]) -> dict[int, Mapping[str, Handle]]:
    """What each stage of this rank takes of `constants`, on its device."""
    return {
        piece: {spec.name: runner.put(constants[spec.name]) for spec in runner.inputs if spec.name in constants}
        for piece, runner in team.runners.items()
    }


def _feeds(
    team: Team, changing: Mapping[str, Array], kept: Mapping[int, Mapping[str, Handle]]
) -> dict[int, Mapping[str, Any]]:
    """What each stage of this rank takes of the inputs of the whole."""
    return {
        piece: {**kept[piece], **{spec.name: changing[spec.name] for spec in runner.inputs if spec.name in changing}}
        for piece, runner in team.runners.items()
    }


def _packed(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> Array:
    """A row for each spec: number of axes and their sizes; -1 axes for an input that is not fed."""
    rows = np.zeros((len(specs), 1 + _MOST_AXES), np.int64)
    for row, spec in zip(rows, specs, strict=True):
        shape = shapes.get(spec.name)
        row[0] = -1 if shape is None else len(shape)
        row[1 : 1 + len(shape or ())] = shape or ()
    return rows


def _unpacked(specs: Sequence[TensorSpec], rows: Array) -> dict[str, tuple[int, ...]]:
    """Shapes by input. Raises PeerError for those that no input has, or that take too much memory."""
    shapes = {}
    for row, spec in zip(rows.tolist(), specs, strict=True):
        if row[0] >= 0:
            shape = tuple(row[1 : 1 + min(row[0], _MOST_AXES)])
            if len(shape) != len(spec.shape) or min(shape) < 1:
                raise PeerError(f"rank 0 sent shape {shape} for {spec.text()}")
            shapes[spec.name] = shape
    if sum(4 * int(np.prod(shape, dtype=object)) for shape in shapes.values()) > _MOST_BYTES:
        raise PeerError(f"rank 0 sent shapes that take more than {_MOST_BYTES} bytes: {shapes}")
    return shapes


@dataclass
class _Port:
    """The whole denoiser as FeedMaker sees a runner; constants stay plain arrays, because they are sent."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        raise PeerError("the whole denoiser is on no rank")

    def put(self, array: Any) -> Any:
        return array

    def close(self) -> None:
        """Nothing is open."""
