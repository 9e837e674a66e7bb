"""The Denoiser of a model with ControlNets (Zhang et al. 2023, arXiv 2302.05543).

Each ControlNet sees the latents, the prompt and a picture; what it gives is added to what the denoiser is fed. Its
outputs are scaled for each picture of a batch and each call, so that pictures at different steps share model calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.kind import CONTROL_IMAGE, CONTROLNET, RESIDUAL, control_names
from diffship.core.spec import TensorSpec
from diffship.sampling.guidance import FeedMaker, guide, guided, like
from diffship.sampling.kernel import Array
from diffship.sampling.model import Model
from diffship.sampling.trajectory import Trajectory

Floats = NDArray[np.float32]
Outputs = Callable[[Sequence[Trajectory]], Sequence[Array]]


def require_controls(model: Model, names: Sequence[str]) -> None:
    """Raises UnsupportedError or ConfigError unless the model has these ControlNets."""
    there = sorted(control_names(model.parts))
    if names and not there:
        raise UnsupportedError(f"{model.name} has no ControlNet; export it with --controlnet {names[0]}=SOURCE")
    for name in names:
        if name not in there:
            raise ConfigError(f"{model.name} has no ControlNet {name[:40]!r}; it has {', '.join(there)}")
    if len(set(names)) != len(names):
        raise ConfigError(f"a ControlNet is named twice: {', '.join(names)}")


class ControlledDenoiser:
    """The Denoiser of a model with ControlNets. Pictures without control are computed by `plain`, which is opened when
    the first of them comes; the others by the form of the denoiser that takes residuals."""

    def __init__(self, model: Model, plain: Callable[[], Outputs]) -> None:
        self._model, self._kind = model, model.family.kind
        self._open_plain = plain
        self._plain: Outputs | None = None
        self._feeds: dict[str, FeedMaker] = {}

    def __call__(self, batch: Sequence[Trajectory]) -> list[Array]:
        groups: dict[tuple[str, ...], list[int]] = {}
        for place, trajectory in enumerate(batch):
            groups.setdefault(tuple(control.name for control in trajectory.controls), []).append(place)
        outputs: list[Array] = [None] * len(batch)
        for names, places in groups.items():
            members = [batch[place] for place in places]
            made = self._controlled(members) if names else self._alone(members)
            for place, output in zip(places, made, strict=True):
                outputs[place] = output
        return outputs

    def _alone(self, batch: Sequence[Trajectory]) -> Sequence[Array]:
        self._plain = self._plain or self._open_plain()
        return self._plain(batch)

    def _controlled(self, batch: Sequence[Trajectory]) -> list[Array]:
        """Guided outputs of trajectories with the same ControlNets, in the same order."""
        part = str(self._kind.controlled)
        runner, feeds = self._model.use(part), self._made(part, batch)
        latents = feeds[self._kind.sample_input]
        specs = [spec for spec in runner.inputs if spec.name.startswith(RESIDUAL)]
        total: dict[str, Array] = {}
        for place in range(len(batch[0].controls)):
            for name, array in self._residuals(batch, place, len(specs)).items():
                total[name] = total[name] + array if name in total else array
        if not total:
            total = _nothing(specs, latents)
        return guide(batch, runner.run({**feeds, **total})[self._kind.output])

    def _residuals(self, batch: Sequence[Trajectory], place: int, count: int) -> dict[str, Array]:
        """What control number `place` of each trajectory adds, by input of the denoiser; nothing if it acts on none."""
        rows = [(t, True) for t in batch if guided(t)] + [(t, False) for t in batch]
        weights = [_weights(trajectory, place, negative, count) for trajectory, negative in rows]
        if not np.any(weights):
            return {}
        part = f"{CONTROLNET}{batch[0].controls[place].name}"
        pictures = np.stack([t.controls[place].image for t, _ in rows]).astype(np.float32) / np.float32(255)
        found = self._model.use(part).run({**self._made(part, batch), CONTROL_IMAGE: pictures})
        by_output = np.array(weights, np.float32).T
        return {
            f"{RESIDUAL}{i}": found[f"{RESIDUAL}{i}"] * like(by_output[i].reshape(-1, 1, 1, 1), found[f"{RESIDUAL}{i}"])
            for i in range(count)
        }

    def _made(self, part: str, batch: Sequence[Trajectory]) -> dict[str, Any]:
        if part not in self._feeds:
            self._feeds[part] = FeedMaker(self._model.use(part), self._kind)
        return self._feeds[part](batch)


def denoising_parts(model: Model) -> tuple[str, ...]:
    """The parts that may be open while `model` denoises."""
    return tuple(sorted(part for part in model.parts if model.family.kind.denoises(part)))


def _weights(trajectory: Trajectory, place: int, negative: bool, count: int) -> Floats:
    """Factors of each of `count` residuals for one row of a batch; with `guess` from a tenth up to 1, evenly in their
    logarithm, and 0 for the negative prompt."""
    control = trajectory.controls[place]
    weight = np.float32(control.weight(trajectory.step))
    if not control.guess:
        return np.full(count, weight, np.float32)
    return np.logspace(-1, 0, count, dtype=np.float32) * (np.float32(0) if negative else weight)


def _nothing(specs: Sequence[TensorSpec], latents: Array) -> dict[str, Array]:
    """Residuals of zeros, where no control acts."""
    rows, _, height, width = latents.shape
    sizes = {"batch_size": rows, "height": height, "width": width}
    return {spec.name: like(np.zeros(spec.resolve(sizes), np.float32), latents) for spec in specs}
