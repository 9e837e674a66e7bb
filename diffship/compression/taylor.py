"""Gradients of the diffusion loss at many timesteps, for first-order (Taylor) importance.

Diff-Pruning (Fang et al., NeurIPS 2023, arXiv 2305.10924) adds the gradients of one batch with one noise over the
timesteps t = 0, 1, 2, ... and stops where the loss has become small beside its largest: what follows are noisy steps
whose gradients say little. Plain Taylor importance takes all timesteps.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.sampling.decode import moments_of, sampled
from diffship.sampling.encode import encode
from diffship.sampling.process import cumulative
from diffship.sampling.rng import VAE_STEP, Noise, TorchNoise
from diffship.sampling.samplers import noise_schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from diffship.training.paired import PairedPictures
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

Loss = tuple[int, float]


@dataclass(frozen=True, eq=False)
class Examples:
    """One batch, fixed: `clean` latents and `noise`, both (n, c, h, w) float32; `conditions`, each (n, ...), are what a
    U-Net takes after the timestep; `alphas` (timesteps,) is the schedule's cumulative product."""

    clean: Tensor
    noise: Tensor
    conditions: tuple[Tensor, ...]
    alphas: Tensor
    prediction: str

    def backward(self, unet: nn.Module, step: int) -> float:
        """Mean squared error at timestep `step`; its gradients are added to those of `unet`."""
        level = cumulative(self.alphas[step])
        noisy = level.mix(self.clean, self.noise)
        times = torch.full((len(noisy),), float(step), device=noisy.device)
        wanted = level.target(self.prediction, self.clean, self.noise)
        loss = F.mse_loss(unet(noisy, times, *self.conditions)[0], wanted)
        torch.autograd.backward(loss)
        return loss.item()


def until_small(losses: Iterable[Loss], threshold: float) -> list[Loss]:
    """(timestep, loss) up to the first loss below `threshold` times the largest so far, that one included.

    Its gradient is added, too, as in Diff-Pruning's released code; the paper's sum ends one step earlier.

    Raises:
        ConfigError: a loss is NaN or infinite.
    """
    taken: list[Loss] = []
    highest = 0.0
    for step, loss in losses:
        if not np.isfinite(loss):
            raise ConfigError(f"the loss at timestep {step} is {loss}; are the weights or the data damaged?")
        taken.append((step, loss))
        highest = max(highest, loss)
        if loss < threshold * highest:
            break
    return taken


def drawn(pictures: PairedPictures, batch: int, seed: int) -> list[int]:
    """Rows of the batch: `batch` different ones of the data, drawn by `seed`."""
    return random.Random(seed).sample(range(len(pictures)), batch)


def examples(
    pipeline: Pipeline, pictures: PairedPictures, rows: Sequence[int], seed: int, device: str = "cpu"
) -> Examples:
    """`rows` of the data through the pipeline's own encoders, with their plain captions, on `device`.

    Noise, of the encoder's posterior and of the diffusion, is drawn by `seed` on the CPU.

    Raises:
        SourceError: a picture is damaged.
        RunnerError: an encoder gives values that are not finite.
    """
    with PipelineModel(pipeline, device) as model:
        source: Noise = TorchNoise.seeded(seed)
        latents = []
        for pixels in pictures.pixels(rows):
            made, source = sampled(model.family, moments_of(model, pixels), source, VAE_STEP)
            latents.append(made)
        clean = np.stack(latents)
        noise, _ = source.draw(clean.shape, 0)
        conditions = _conditions(model, [pictures.captions(row)[0] for row in rows], pictures.size)
    schedule = noise_schedule(pipeline.scheduler)
    return Examples(
        torch.from_numpy(clean).to(device),
        torch.from_numpy(noise).to(device),
        tuple(condition.to(device) for condition in conditions),
        torch.from_numpy(schedule.alphas_cumprod().copy()).to(device),
        schedule.prediction_type,
    )


def _conditions(model: PipelineModel, captions: Sequence[str], size: int) -> tuple[Tensor, ...]:
    """What the U-Net takes after the timestep, in its order, one row per caption."""
    encoded = [encode(model, caption, None, (size, size), 1.0).positive for caption in captions]
    family, inputs = model.family, model.pipeline.denoiser.inputs
    rows: dict[str, Any] = {name: np.stack([condition[name] for condition in encoded]) for name in encoded[0]}
    rows |= family.kind.guidance_inputs(inputs, [family.guidance_default] * len(encoded))
    return tuple(torch.from_numpy(rows[spec.name]) for spec in inputs[2:])
