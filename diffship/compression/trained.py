"""What passes that train have in common: which teacher fits, what stops a run, and what a run's folder hangs on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship import __version__
from diffship.compression.stored import settings_key
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.problem import Problem
from diffship.core.weights import SafetensorsWeights, Weights, renamed
from diffship.models.pipeline import Pipeline
from diffship.sampling.samplers import noise_schedule
from diffship.sampling.schedule import Schedule

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

# what does not change the weights: a run with other values of these goes on
CADENCE = ("save_seconds", "validate_every", "prompts")
AVERAGE = "average/unet/"
MIN_SNR = "min-snr-5-capped"  # a weighting of the loss (`training.diffusion.loss_weight`)


def trained_schedule(pipeline: Pipeline) -> Schedule:
    """The betas that the model was trained with.

    Raises:
        UnsupportedError: it was trained without any, as models of flow matching are.
    """
    return noise_schedule({"prediction_type": pipeline.family.prediction_type, **pipeline.scheduler})


_MUST_AGREE: dict[str, Callable[[Pipeline], Any]] = {
    "prediction type": lambda pipeline: pipeline.family.prediction_type,
    "latent channels": lambda pipeline: pipeline.family.latent_channels,
    "scaling factor of the latents": lambda pipeline: pipeline.family.scaling_factor,
    "text width": lambda pipeline: pipeline.family.text_width,
    "conditions of the U-Net": lambda pipeline: [spec.name for spec in pipeline.denoiser.inputs],
    "betas": lambda pipeline: trained_schedule(pipeline).alphas_cumprod(),
}


def require_agreement(student: Pipeline, teacher: Pipeline) -> None:
    """Raises ConfigError if the two do not predict the same thing from the same inputs."""
    for what, of in _MUST_AGREE.items():
        mine, theirs = of(student), of(teacher)
        if not np.array_equal(mine, theirs):
            said = "" if isinstance(mine, np.ndarray) else f": {mine} and {theirs}"
            raise ConfigError(f"student and teacher {teacher.source.get('id')} differ in {what}{said}")


def untrainable(pipeline: Pipeline, pixels: int, batch: int, precision: str) -> Iterator[Problem]:
    """Why no training of this U-Net can start, whatever it is to learn."""
    if pipeline.family.unet_channels != pipeline.family.latent_channels:
        why = "is an inpainting model; models that draw whole pictures are distilled"
        yield Problem(pipeline.family.kind.denoiser, why)
    yield from unplaced(pipeline, pixels, batch, precision)


def unweighed(pipeline: Pipeline, weighting: str) -> Iterator[Problem]:
    """Why the loss of this model cannot be weighted so."""
    kind = pipeline.family.prediction_type
    if weighting != "none" and kind != "epsilon":
        yield Problem(pipeline.family.kind.denoiser, f"predicts {kind}; {MIN_SNR} weighs the error of predicted noise")


def unplaced(pipeline: Pipeline, pixels: int, batch: int, precision: str) -> Iterator[Problem]:
    """Why no training with these pictures can start on these machines, of whatever part."""
    family, processes = pipeline.family, int(os.environ.get("WORLD_SIZE", "1"))
    if batch % processes:
        yield Problem("", f"batch {batch} cannot be shared by {processes} processes; make it a multiple")
    if precision == "fp16" and not torch.cuda.is_available():
        yield Problem("", "mixed precision fp16 needs a GPU; choose bf16 or fp32")
    try:
        family.check_size(pixels, pixels)
    except ConfigError as fault:
        yield Problem.of("", fault)


def run_key(
    step: Any, aside: Collection[str], pixels: int, pipeline: Pipeline, teacher: Pipeline, digests: Mapping[str, str]
) -> str:
    """40 hex digits of all that the weights of a run hang on; options in `aside` and those of cadence do not count."""
    options = {name: value for name, value in asdict(step).items() if name not in (*CADENCE, *aside)}
    kind = pipeline.family.kind
    frozen = {
        name: pipeline.components[name].digest
        for name in (kind.denoiser, *kind.text_parts, kind.encoder)
        if name in pipeline.components
    }
    settings = [settings_key(one) for one in (pipeline, teacher)]
    text = json.dumps([__version__, options, digests, frozen, settings, pixels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def averaged_weights(state: SafetensorsWeights) -> dict[str, str]:
    """{name in the U-Net: name in the checkpoint} of the averaged weights."""
    return {name.removeprefix(AVERAGE): name for name in state.names() if name.startswith(AVERAGE)}


def trained_weights(state: SafetensorsWeights, names: Collection[str]) -> Weights:
    """Averages of those of `names` that were trained.

    Tensors of a file that the module lacks (diffusers warns of them) were not trained, and are left out.
    """
    trained = averaged_weights(state)
    return renamed(state, {name: trained[name] for name in names if name in trained})
