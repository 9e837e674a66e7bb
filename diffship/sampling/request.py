"""What one asks of a model, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffship.core.brief import brief
from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.limits import LIMITS, check_range
from diffship.core.registry import SPACINGS
from diffship.core.strict import unknown
from diffship.sampling.kernel import Array
from diffship.sampling.rng import NOISES
from diffship.sampling.sampler import Sampler
from diffship.sampling.samplers import SAMPLERS, make_sampler
from diffship.sampling.tokenizer import check_prompt

MEMORY = ("normal", "low")


@brief
@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to draw it; None takes the model's default.

    `negative` None is "none given", which SDXL encodes as zeros; "" is the empty prompt. Image i uses seed + i (torch)
    or the key (seed, i) (philox). `latents` (images, then the shape of one picture's) replaces the initial noise, unit
    normal, so that two clients can start from the same. `batch` is how many images share a model call (default: all, or
    one with low memory). `spacing` (linspace, leading, trailing) replaces the scheduler's `timestep_spacing`; few-step
    students are made for trailing, whatever their folders say. `strength` is for models that fill masks: below 1 they
    begin with the image under that share of the noise, and leave out the first calls.
    """

    prompt: str
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None  # width, height
    seed: int = 0
    rng: str = "torch"
    sampler: str | None = None
    spacing: str | None = None
    strength: float | None = None
    images: int = 1
    memory: str = "normal"
    batch: int | None = None
    latents: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", check_prompt(self.prompt))
        if self.negative is not None:
            object.__setattr__(self, "negative", check_prompt(self.negative, "negative prompt"))
        if self.steps is not None:
            check_range("steps", self.steps, *LIMITS.steps)
        if self.guidance is not None:
            check_range("guidance", self.guidance, *LIMITS.guidance)
        if self.strength is not None:
            check_range("strength", self.strength, *LIMITS.strength)
        check_range("images", self.images, *LIMITS.images)
        check_range("seed", self.seed, LIMITS.seed[0], LIMITS.seed[1] - self.images + 1)
        if self.batch is not None:
            check_range("batch", self.batch, 1, LIMITS.images[1])
        _check_choice("rng", self.rng, NOISES)
        _check_choice("memory", self.memory, MEMORY)
        if self.sampler is not None:
            _check_choice("sampler", self.sampler, tuple(SAMPLERS))
        if self.spacing is not None:
            _check_choice("spacing", self.spacing, SPACINGS)
        _check_size(self.size)


@brief
@dataclass(frozen=True, eq=False)
class Settled:
    """A request with nothing left open."""

    request: Request
    sampler: Sampler
    steps: int
    guidance: float
    size: tuple[int, int]
    latent_shape: tuple[int, ...]  # of one picture; (channels, height, width) as a rule
    strength: float = 1.0
    begin: int = 0  # the first model call


def settle(request: Request, family: Family, scheduler: Mapping[str, Any]) -> Settled:
    """Fill in the model's defaults and check what only the model knows.

    Raises:
        ConfigError: a size, number of steps, spacing or latents that the model or its sampler cannot take.
        UnsupportedError: a sampler option that is not built.
    """
    width, height = request.size or family.default_sides
    shape = family.latent_shape(width, height)
    steps = family.steps_default if request.steps is None else request.steps
    sampler = _sampler(request, {"prediction_type": family.prediction_type, **scheduler})
    sampler = family.kind.sized(sampler, shape, steps)
    sampler.calls(steps)
    _check_latents(request.latents, (request.images, *shape))
    guidance = family.guidance_default if request.guidance is None or not family.guided else float(request.guidance)
    strength = _strength(request, family)
    begin = sampler.begins_at(strength, steps)
    return Settled(request, sampler, steps, guidance, (width, height), shape, strength, begin)


def _strength(request: Request, family: Family) -> float:
    if not family.fills_masks:
        if request.strength is not None:
            raise ConfigError(f"strength is {request.strength:g}; it is for models that fill masks, and this is none")
        return 1.0
    return family.strength_default if request.strength is None else float(request.strength)


def _sampler(request: Request, config: Mapping[str, Any]) -> Sampler:
    if request.spacing is None:
        return make_sampler(config, request.sampler)
    made = make_sampler({**config, "timestep_spacing": request.spacing}, request.sampler)
    if not made.spaced:
        raise ConfigError(f"the {made.name} sampler has timesteps of its own; spacing has no say in it")
    return made


def _check_choice(name: str, value: object, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ConfigError(unknown(name, value, legal))


def _check_size(size: object) -> None:
    if size is None:
        return
    if not (isinstance(size, tuple) and len(size) == 2):
        raise ConfigError(f"size is {str(size)[:60]}; it must be (width, height)")
    for name, side in zip(("width", "height"), size, strict=True):
        check_range(name, side, *LIMITS.size_px)


def _check_latents(latents: Array | None, shape: tuple[int, ...]) -> None:
    if latents is None:
        return
    if tuple(latents.shape) != shape:
        raise ConfigError(f"latents have shape {tuple(latents.shape)}; this request needs {shape}")
    if isinstance(latents, np.ndarray) and (latents.dtype.kind != "f" or not np.isfinite(latents).all()):
        raise ConfigError(f"latents are {latents.dtype} and must be finite floats")
