"""The denoising loop: `advance` makes one model call for a batch, everything else repeats it.

A Denoiser maps a batch (a list of Trajectories, at whatever steps and with whatever samplers) to the guided model
output of each. Handoff, resume, previews and servers need nothing but this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import Cancelled, ConfigError
from diffship.core.kind import Kind
from diffship.core.runner import Runner
from diffship.sampling.controlled import ControlledDenoiser
from diffship.sampling.guidance import FeedMaker, guide, like
from diffship.sampling.kernel import Array, apply_matrix
from diffship.sampling.model import Model
from diffship.sampling.trajectory import Trajectory, as_numpy, at_step

Denoiser = Callable[[Sequence[Trajectory]], Sequence[Array]]
OnStep = Callable[[Sequence[Trajectory]], None]


def advance(batch: Sequence[Trajectory], denoiser: Denoiser) -> list[Trajectory]:
    """One model call for every trajectory of `batch`.

    Raises:
        ConfigError: a trajectory has no call left.
    """
    for trajectory in batch:
        if trajectory.done:
            raise ConfigError(f"the trajectory is at its last step ({trajectory.step}); decode it")
    outputs = denoiser(batch)
    if len(outputs) != len(batch):
        raise ConfigError(f"the denoiser gave {len(outputs)} outputs for {len(batch)} trajectories")
    return [_apply(trajectory, output) for trajectory, output in zip(batch, outputs, strict=True)]


def denoise(
    batch: Sequence[Trajectory],
    denoiser: Denoiser,
    until: int | None = None,
    on_step: OnStep | None = None,
    cancel: Callable[[], bool] | None = None,
) -> list[Trajectory]:
    """Advance each trajectory to call `until` (default: its end); those that are there already wait.

    `on_step` sees the whole batch after every call.

    Raises:
        Cancelled: `cancel()` was true between two calls.
    """
    current = list(batch)
    while True:
        active = [i for i, trajectory in enumerate(current) if trajectory.step < _goal(trajectory, until)]
        if not active:
            return current
        if cancel is not None and cancel():
            raise Cancelled(f"stopped before call {current[active[0]].step + 1}")
        for i, trajectory in zip(active, advance([current[i] for i in active], denoiser), strict=True):
            current[i] = trajectory
        if on_step is not None:
            on_step(current)


def latents_by_step(trajectory: Trajectory, denoiser: Denoiser) -> dict[str, NDArray[np.float32]]:
    """Draw to the end: the latents after each call, `step.1` on."""
    found: dict[str, NDArray[np.float32]] = {}

    def keep(batch: Sequence[Trajectory]) -> None:
        found[f"step.{batch[0].step}"] = as_numpy(batch[0].latents)

    denoise([trajectory], denoiser, on_step=keep)
    return found


def plain(runner: Runner, kind: Kind) -> Denoiser:
    """The Denoiser of one whole network of this kind: rows in, its prediction out, guidance applied."""
    feeds = FeedMaker(runner, kind)

    def run(batch: Sequence[Trajectory]) -> list[Array]:
        rows = runner.run(feeds(batch))[kind.output]
        return guide(batch, kind.unpack_output(rows, batch[0].latents.shape))

    return run


def denoiser_of(model: Model) -> Denoiser:
    """The Denoiser of a model's own denoiser, which is opened now; of one with ControlNets, when it is called."""
    kind = model.family.kind
    if kind.controlled in model.parts:
        return ControlledDenoiser(model, lambda: plain(model.use(kind.denoiser), kind))
    return plain(model.use(kind.denoiser), kind)


def _goal(trajectory: Trajectory, until: int | None) -> int:
    return trajectory.calls if until is None else min(until, trajectory.calls)


def _apply(trajectory: Trajectory, output: Array) -> Trajectory:
    now = trajectory.sampler.coefficients(trajectory.step, trajectory.steps, len(trajectory.history))
    fresh, noise = None, trajectory.noise
    if now.noisy:
        fresh, noise = noise.draw(tuple(trajectory.latents.shape), trajectory.step + 1)
        fresh = like(fresh, trajectory.latents)
    latents, *history = apply_matrix(now.matrix, trajectory.latents, output, fresh, trajectory.history)
    return at_step(trajectory, _blended(trajectory, latents), tuple(history), noise)


def _blended(trajectory: Trajectory, latents: Array) -> Array:
    """`latents` after a call with the image put back where the mask is 0, under the noise of the next call.

    As diffusers' StableDiffusionInpaintPipeline does for a denoiser that reads no mask.
    """
    mask, clean, noise = trajectory.mask, trajectory.init_latents, trajectory.init_noise
    if mask is None or clean is None or noise is None:
        return latents
    now, kept = trajectory.step + 1, like(clean, latents)
    if now < trajectory.calls:
        signal, spread = trajectory.sampler.noising(now, trajectory.steps)
        kept = kept * signal + like(noise, latents) * spread
    drawn = like(mask, latents)
    return kept * (1 - drawn) + latents * drawn
