"""A toy denoiser in stages, and AsyncDiff's published equation evaluated over it recursively, step by step.

Nothing of diffship's timetable is used: `published` asks for each prediction and follows its inputs back in time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffship.core.runner import Handle
from diffship.core.spec import TensorSpec
from diffship.runtimes.partition.placement import Placement, place

PLANE = ("batch_size", 4, "height", "width")


@dataclass(frozen=True)
class Toy:
    """A stage as a Runner: a fixed map of the latents (first stage only), the timestep and what it reads."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    gain: float

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        own = () if self.reads else (TensorSpec("sample", "float32", PLANE),)
        return (*own, TensorSpec("timestep", "float32", ("batch_size",)), *self._specs(self.reads))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._specs(self.writes)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert set(feeds) == {spec.name for spec in self.inputs}
        push = np.asarray(feeds["timestep"], np.float32).reshape(-1, 1, 1, 1) / np.float32(700)
        mixed = push
        for k, name in enumerate(sorted(set(feeds) - {"timestep"})):
            mixed = mixed + np.roll(feeds[name], k + 1, axis=-1) * np.float32(self.gain / (k + 1))
        return {name: np.tanh(mixed + np.float32(0.1 * k)) for k, name in enumerate(self.writes)}

    def put(self, array: Any) -> Handle:
        return Handle(array, tuple(array.shape))

    def close(self) -> None:
        pass

    @staticmethod
    def _specs(names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, "float32", PLANE) for name in names)


def toys(devices: int, ends: bool = False) -> tuple[list[Toy], list[int]]:
    """Stages and their devices: a U-Net cut in a row, or with both ends on the last device, as SDXL is cut."""
    count = devices + 1 if ends and devices > 1 else devices
    homes = [devices - 1, *range(devices)] if count > devices else list(range(devices))
    stages = []
    for k in range(count):
        last = k == count - 1
        reads = (f"hidden.{k - 1}", *((f"skip.{i}" for i in range(k)) if last else ())) if k else ()
        writes = ("out_sample",) if last else (f"hidden.{k}", f"skip.{k}")
        stages.append(Toy(f"toy.{k}", reads, writes, 0.9 - 0.1 * k))
    return stages, homes


def placed(devices: int, ends: bool = False) -> Placement:
    return place(*toys(devices, ends))


def published(
    devices: int,
    ends: bool,
    start: Any,
    times: list[float],
    follow: Callable[[int, Any, Any], Any],
    stride: int,
    warm_up: int,
    shift: bool,
    scales: Sequence[float] | None = None,
) -> list[Any]:
    """Predictions of all steps; `follow(step, x, eps)` is the sampler, `scales` what it multiplies latents with.

    eps_i = F_N(... F_1(x, t) ...), where stages on other devices are those of the round before and the first steps are
    exact; with stride 2 a round's owners embed the step ahead, while the extra device finishes step i itself.
    """
    stages, homes = toys(devices, ends)
    owner = {name: k for k, stage in enumerate(stages) for name in stage.writes}
    xs, known = [start], {}

    def run(k: int, begin: int, time: int) -> Mapping[str, Any]:
        if (k, begin, time) not in known:
            feeds = {name: boundary(name, k, begin, time) for name in stages[k].reads}
            feeds |= (
                {}
                if stages[k].reads
                else {"sample": xs[begin] if scales is None else xs[begin] * np.float32(scales[begin])}
            )
            known[k, begin, time] = stages[k].run({**feeds, "timestep": np.float32([times[time]])})
        return known[k, begin, time]

    def boundary(name: str, reader: int, begin: int, time: int) -> Any:
        k = owner[name]
        if begin < warm_up or homes[k] == homes[reader]:
            return run(k, begin, time)[name]
        earlier = max(begin - stride, warm_up - 1)
        lookahead = earlier if earlier < warm_up else min(earlier + stride - 1, len(times) - 1) - int(shift)
        return run(k, earlier, lookahead)[name]

    predictions = []
    for step in range(len(times)):
        if step < warm_up:
            eps = run(len(stages) - 1, step, step)["out_sample"]
        else:
            begin = step - (step - warm_up) % stride
            eps = run(len(stages) - 1, begin, step - int(shift))["out_sample"]
        predictions.append(eps)
        xs.append(follow(step, xs[step], eps))
    return predictions
