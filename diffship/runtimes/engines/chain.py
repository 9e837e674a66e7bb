"""ChainRunner: the stages of a denoiser one after the other, as a runner of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffship.core.errors import RunnerError
from diffship.core.runner import Array, Handle, Runner
from diffship.core.spec import TensorSpec
from diffship.core.strict import unknown


class ChainRunner:
    """Computes what the whole computes. `stages` are in order: each takes inputs of the whole and outputs of stages
    before it, under the names that they have there.

    `close` calls `release`, because the stages belong to whoever opened them.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[Runner],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        release: Callable[[], None],
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self._stages = tuple(stages)
        self._takes = [frozenset(spec.name for spec in stage.inputs) for stage in stages]
        self._release = release

    def run(self, feeds: Mapping[str, Array | Handle]) -> dict[str, Array]:
        """One call; see `Runner.run`. A tensor is dropped when no later stage takes it."""
        self._check_names(feeds)
        kept = {spec.name for spec in self.outputs}
        values: dict[str, Any] = dict(feeds)
        for place, stage in enumerate(self._stages):
            given = {name: values[name] for name in self._takes[place]}
            values |= stage.run({name: _own(value, place) for name, value in given.items()})
            later = kept.union(*self._takes[place + 1 :])
            values = {name: value for name, value in values.items() if name in later}
        return {spec.name: values[spec.name] for spec in self.outputs}

    def put(self, array: Array) -> Handle:
        """Keep a copy of `array` on the device of every stage; it may stand for a feed of this runner."""
        return Handle([stage.put(array) for stage in self._stages], tuple(np.shape(array)))

    def close(self) -> None:
        self._release()

    def _check_names(self, feeds: Mapping[str, object]) -> None:
        names = [spec.name for spec in self.inputs]
        missing = [name for name in names if name not in feeds]
        if missing:
            raise RunnerError(f"part {self.name}: missing feed {', '.join(missing)}; it takes {', '.join(names)}")
        for name in feeds:
            if name not in names:
                raise RunnerError(f"part {self.name}: {unknown('feed', name, names)}")


def _own(value: Array | Handle, place: int) -> Array | Handle:
    """A stage's own handle of a constant that all stages keep."""
    return value.value[place] if isinstance(value, Handle) else value
