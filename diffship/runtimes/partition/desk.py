"""Desk: what one rank does of a timetable. Its stages run here; boundary tensors go to, and come from, other ranks.

A tensor is sent as soon as it is made, and received into a buffer that was allocated when the run began. What the next
round reads is on its way while this one still computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import DiffshipError, RunnerError
from diffship.core.runner import Runner
from diffship.core.spec import TensorSpec
from diffship.runtimes.partition.course import PREDICTION
from diffship.runtimes.partition.ranks import Ranks
from diffship.runtimes.partition.timetable import Made, Round, Task, Timetable

Array = NDArray[Any]
FIRST_TAG = 16  # of boundary tensors; lower ones are those of `distributed`
_BUFFERS = 2  # of each tensor: one is read while the next one comes


class Desk:
    """`device` of `table`; the ranks of the run's devices begin at `first`.

    runners: by stage, those of this device. specs: of every boundary tensor; sizes: of their axes. A boundary tensor
    has, on the wire, the dtype of its spec.
    """

    def __init__(
        self,
        ranks: Ranks,
        first: int,
        table: Timetable,
        device: int,
        runners: Mapping[int, Runner],
        specs: Mapping[str, TensorSpec],
        sizes: Mapping[str, int],
    ) -> None:
        self.table, self.device = table, device
        self._ranks, self._first, self._runners, self._specs = ranks, first, runners, specs
        self._tags = {name: FIRST_TAG + i for i, name in enumerate(sorted(specs))}
        read = {made.tensor for each in table.rounds for task in self._mine(each) for made in self._foreign(task)}
        self._buffers = {
            name: [np.empty(specs[name].resolve(sizes), specs[name].dtype) for _ in range(_BUFFERS)]
            for name in sorted(read)
        }
        self._made: dict[Made, Any] = {}
        self._coming: dict[Made, Callable[[], Array]] = {}
        self._going: list[Callable[[], None]] = []

    def play(self, index: int, feeds: Mapping[int, Mapping[str, Any]]) -> dict[int, Array]:
        """One round; `feeds` has, by stage, what a stage takes beside boundary tensors.

        Returns:
            Predictions of this device, by step.

        Raises:
            RunnerError: a stage failed; the message names it. PeerError: another rank did.
        """
        each = self.table.rounds[index]
        self._finish_sending()
        ready: dict[int, Array] = {}
        for task in self._mine(each):
            given = {made.tensor: self._taken(made) for made in task.reads}
            outputs = self._run(task, {**feeds[task.piece], **given})
            for name in self.table.placement.pieces[task.piece].writes:
                self._hand_on(Made(index, self.device, name), outputs[name])
            if task.predicts is not None:
                ready[task.predicts] = np.asarray(outputs[PREDICTION])
        self._expect(index + 1)
        return ready

    def leave(self) -> None:
        """Take what is still on its way: the run ends here, before the end of its table or at it."""
        for made in list(self._coming):
            self._coming.pop(made)()
        self._finish_sending()
        self._made = {}

    def _run(self, task: Task, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        name = self.table.placement.pieces[task.piece].name
        try:
            return self._runners[task.piece].run(feeds)
        except Exception as fault:
            step = f"step {task.sample + 1} of {self.table.calls}"
            told = str(fault) if isinstance(fault, DiffshipError) else str(fault) or type(fault).__name__
            raise RunnerError(f"stage {name} on rank {self._first + self.device}, {step}: {told}") from fault

    def _taken(self, made: Made) -> Any:
        """A tensor that was made here, has come, or is waited for now."""
        if made not in self._made:
            self._expect_one(made)
            self._made[made] = self._coming.pop(made)()
        return self._made[made]

    def _expect(self, index: int) -> None:
        """Begin to receive what round `index` reads of the round before it; forget what it does not read."""
        later = self.table.rounds[index : index + 1]
        wanted = {made for each in later for task in self._mine(each) for made in task.reads if made.round < index}
        self._made = {made: array for made, array in self._made.items() if made in wanted}
        for made in sorted(wanted):
            if made.device != self.device and made not in self._made:
                self._expect_one(made)

    def _expect_one(self, made: Made) -> None:
        if made not in self._coming:
            buffer = self._buffers[made.tensor][made.round % _BUFFERS]
            what = f"{made.tensor} of round {made.round + 1}"
            self._coming[made] = self._ranks.expect(self._first + made.device, buffer, self._tags[made.tensor], what)

    def _hand_on(self, made: Made, array: Any) -> None:
        self._made[made] = array
        for device in self._readers(made):
            sent = np.asarray(array, self._specs[made.tensor].dtype)
            what = f"{made.tensor} of round {made.round + 1}"
            self._going.append(self._ranks.send(self._first + device, sent, self._tags[made.tensor], what))

    def _readers(self, made: Made) -> list[int]:
        rounds = self.table.rounds[made.round : made.round + 2]
        found = {task.device for each in rounds for task in each.tasks if made in task.reads}
        return sorted(found - {self.device})

    def _finish_sending(self) -> None:
        going, self._going = self._going, []
        for finish in going:
            finish()

    def _mine(self, each: Round) -> list[Task]:
        return [task for task in each.tasks if task.device == self.device]

    def _foreign(self, task: Task) -> list[Made]:
        return [made for made in task.reads if made.device != self.device]
