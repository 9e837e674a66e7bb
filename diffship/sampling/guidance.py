"""Classifier-free guidance as rows of a batch, and LCM's guidance embedding.

Rows are all negatives first, then all positives, as diffusers stacks them (Ho and Salimans 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.kind import CONTROL_IMAGE, RESIDUAL, Kind
from diffship.core.runner import Runner
from diffship.sampling.kernel import Array, as_float32
from diffship.sampling.samplers import CONSISTENCY
from diffship.sampling.trajectory import Conditioning, Trajectory

Key = tuple[Any, ...]
_COND_FREQUENCY = 10_000.0
_LCM_LORA_GUIDANCE = 2.0  # up to here, as its authors recommend (arXiv 2311.05556)


def guided(trajectory: Trajectory) -> bool:
    """Whether a trajectory takes two rows. `negative` is None for models that take guidance as an embedding."""
    return trajectory.guidance > 1.0 and trajectory.negative is not None


def unheeded(family: Family, scheduler: Mapping[str, Any], guidance: float, negative: str | None) -> tuple[str, ...]:
    """Warnings: a negative prompt that nothing reads, or guidance that a model for few steps was not made for.

    `scheduler` is the model's own, whatever sampler is used.
    """
    found = []
    if not family.guided and (negative or guidance > 1.0):
        what = "the negative prompt is" if negative else f"guidance {guidance:g} is"
        return (f"{what} not used: this model is distilled to draw without guidance",)
    if negative and family.takes_guidance:
        found.append(
            "the negative prompt is not used: this model takes guidance as an input, without a negative prompt"
        )
    elif negative and guidance <= 1.0:
        found.append(f"the negative prompt is not used: guidance is {guidance:g}, and it takes guidance above 1")
    sampler = scheduler.get("_class_name")
    lora = not family.takes_guidance and sampler in CONSISTENCY
    if lora and guidance > _LCM_LORA_GUIDANCE:
        origin = "LCM-LoRA" if sampler == "LCMScheduler" else "made for TCD"
        found.append(
            f"guidance is {guidance:g}: this model has its guidance in its weights ({origin}); from 1 to "
            f"{_LCM_LORA_GUIDANCE:g} is good, more gives hard contrasts and colours"
        )
    return tuple(found)


def guide(batch: Sequence[Trajectory], rows: Array) -> list[Array]:
    """Rows of a model's output (negatives first) to one guided output per trajectory, in float32.

    Equation: negative + guidance * (positive - negative).
    """
    twice = [guided(trajectory) for trajectory in batch]
    first, out, negatives = sum(twice), [], 0
    for i, (trajectory, double) in enumerate(zip(batch, twice, strict=True)):
        positive = as_float32(rows[first + i])
        if double:
            negative = as_float32(rows[negatives])
            negatives += 1
            positive = negative + (positive - negative) * float(trajectory.guidance)
        out.append(positive)
    return out


def group_key(trajectory: Trajectory) -> Key:
    """Equal for trajectories that may share a model call; the latents' shape comes first."""
    return (
        tuple(trajectory.latents.shape),
        trajectory.mask is not None,
        _shapes(trajectory.positive),
        _shapes(trajectory.negative) or _shapes(trajectory.positive),
    )


def _shapes(condition: Conditioning | None) -> Key:
    if condition is None:
        return ()
    return tuple((name, tuple(array.shape)) for name, array in sorted(condition.items()))


class FeedMaker:
    """Feeds of a denoiser for a batch; embeddings stay on the device while the batch keeps the same prompts.

    `runner` may be that of a stage, which takes some inputs of the whole, and boundary tensors that are not made here.
    """

    def __init__(self, runner: Runner, kind: Kind) -> None:
        self._runner = runner
        self._kind = kind
        names = {spec.name for spec in runner.inputs}
        self._conditions = [name for name in kind.condition_names if name in names]
        self._steered = any(name == CONTROL_IMAGE or name.startswith(RESIDUAL) for name in names)
        # what the last call's feeds were made of, and those feeds: one attribute, so that threads may share it
        self._last: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, batch: Sequence[Trajectory]) -> dict[str, Any]:
        """Feeds for `batch`, rows as in `guide`.

        Raises:
            ConfigError: sizes differ within the batch, or a condition that the model takes is missing.
        """
        if not self._steered and any(t.controls for t in batch):
            raise ConfigError(
                "a ControlNet acts on the trajectory, and this denoiser takes no residuals: open one that does"
            )
        order = [*(t for t in batch if guided(t)), *batch]
        conditions = [*(t.negative for t in batch if guided(t)), *(t.positive for t in batch)]
        times = [t.sampler.coefficients(t.step, t.steps, len(t.history)).timestep for t in order]
        shape = _one_shape([t.latents for t in order])
        samples = [self._kind.pack_latents(_sample(t)) for t in order]
        return {
            self._kind.sample_input: _stack(self._kind.sample_input, samples),
            self._kind.time_input: like(np.array(times, np.float32), order[0].latents),
            **self._conditioning(conditions, [t.guidance for t in order], shape),
        }

    def _conditioning(
        self, conditions: Sequence[Conditioning | None], guidances: Sequence[float], shape: tuple[int, ...]
    ) -> dict[str, Any]:
        wanted = (*conditions, *guidances, *shape)
        held, constants = self._last
        if wanted != held:
            arrays = self._arrays(conditions, guidances)
            arrays |= self._kind.position_inputs(self._runner.inputs, shape, conditions[0] or {})
            constants = {name: self._runner.put(array) for name, array in arrays.items()}
            self._last = (wanted, constants)
        return constants

    def _arrays(self, conditions: Sequence[Conditioning | None], guidances: Sequence[float]) -> dict[str, Any]:
        arrays = {
            name: _stack(name, [None if condition is None else condition.get(name) for condition in conditions])
            for name in self._conditions
        }
        return {**arrays, **self._kind.guidance_inputs(self._runner.inputs, guidances)}


def guidance_embedding(w: float, width: int = 256) -> NDArray[np.float32]:
    """LCM's embedding of w = guidance - 1, float32 (width,): sin then cos of 1000 w times falling frequencies.

    `width` is at least 4: one frequency alone has no step to the next.
    Rounded to float32 where diffusers' `get_guidance_scale_embedding` is: the arguments reach thousands of radians.
    """
    half = width // 2
    if half < 2:
        raise ConfigError(f"a guidance embedding {width} wide has no frequencies; legal is 4 or more")
    step = np.float32(np.float32(math.log(_COND_FREQUENCY)) / np.float32(half - 1))
    exponent = np.arange(half, dtype=np.float32) * -step
    angle = np.float32(np.float32(w) * np.float32(1000.0)) * np.exp(exponent.astype(np.float64)).astype(np.float32)
    waves = np.concatenate([np.sin(angle.astype(np.float64)), np.cos(angle.astype(np.float64))])
    return np.pad(waves, (0, width - 2 * half)).astype(np.float32)


def _sample(trajectory: Trajectory) -> Array:
    now = trajectory.sampler.coefficients(trajectory.step, trajectory.steps, len(trajectory.history))
    scaled = trajectory.latents if now.input_scale == 1.0 else trajectory.latents * now.input_scale
    if trajectory.mask is None or trajectory.masked_latents is None:
        return scaled
    return _concatenate([scaled, trajectory.mask, trajectory.masked_latents])


def _one_shape(latents: Sequence[Array]) -> tuple[int, ...]:
    shapes = {tuple(array.shape) for array in latents}
    if len(shapes) != 1:
        told = ", ".join(map(str, sorted(shapes)))
        raise ConfigError(f"latents have different shapes within one batch: {told}; group trajectories by size")
    return shapes.pop()


def _stack(name: str, arrays: Sequence[Array]) -> Array:
    if any(array is None for array in arrays):
        raise ConfigError(f"the model takes {name}, and a trajectory of the batch has none: encode its prompt first")
    if len({tuple(array.shape) for array in arrays}) != 1:
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise ConfigError(f"{name} has different shapes within one batch: {shapes}; group trajectories by size")
    return _concatenate([array[None] for array in arrays])


def _concatenate(arrays: Sequence[Array]) -> Array:
    foreign = next((array for array in arrays if hasattr(array, "new_empty")), None)
    if foreign is None:
        return np.concatenate(arrays)
    # torch without importing it: the tensor makes room of its own kind on its own device
    joined = foreign.new_empty((sum(array.shape[0] for array in arrays), *foreign.shape[1:]))
    start = 0
    for array in arrays:
        end = start + array.shape[0]
        joined[start:end] = foreign.new_tensor(array) if isinstance(array, np.ndarray) else array
        start = end
    return joined


def like(array: NDArray[np.float32], model: Array) -> Array:
    """`array` in the array type of `model` if that can make one (torch's `new_tensor`); otherwise `array` as it is."""
    return model.new_tensor(array) if hasattr(model, "new_tensor") else array
