"""What one asks of a model, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.family import Family
from diffship.core.limits import LIMITS, check_range
from diffship.core.reading import PLAIN, Reading
from diffship.core.registry import SPACINGS, SYNTAXES
from diffship.core.strict import unknown
from diffship.sampling.control import Control
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
    students are made for trailing, whatever their folders say. `eta` is the share of noise that the sampler tcd draws
    anew at each step (0 is none; Hyper-SD's LoRA for one step wants 1).

    With `image` (uint8 (height, width, 3)) the picture begins with that image under the share `strength` of the noise,
    and the first calls are left out (image-to-image; SDEdit, Meng et al. 2021). With `mask` too (uint8 (height, width))
    only what the mask covers, 128 and above, is drawn anew (inpainting). Both are resized to the picture, whose size is
    the image's own, rounded down to what the model draws, unless `size` says another.

    `controls` are ControlNets of the bundle with the pictures that they see. With `guess` they lead without a prompt:
    they act on the positive row of guidance alone.

    `prompt_syntax` (plain, a1111, compel) says how the prompts are written, and `clip_skip` how many of the last layers
    of the CLIP text encoders are left out, as diffusers counts (docs/prompts.md). With `first_image` images begin at
    that number in place of 0: so image 2 of four is drawn again by itself.
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
    eta: float | None = None
    strength: float | None = None
    images: int = 1
    memory: str = "normal"
    batch: int | None = None
    latents: Array | None = None
    prompt_syntax: str = PLAIN.syntax
    clip_skip: int = PLAIN.clip_skip
    first_image: int = 0
    image: NDArray[np.uint8] | None = None
    mask: NDArray[np.uint8] | None = None
    controls: tuple[Control, ...] = ()
    guess: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", check_prompt(self.prompt))
        if self.negative is not None:
            object.__setattr__(self, "negative", check_prompt(self.negative, "negative prompt"))
        if self.steps is not None:
            check_range("steps", self.steps, *LIMITS.steps)
        if self.guidance is not None:
            check_range("guidance", self.guidance, *LIMITS.guidance)
        if self.eta is not None:
            check_range("eta", self.eta, *LIMITS.eta)
        if self.strength is not None:
            check_range("strength", self.strength, *LIMITS.strength)
        check_range("images", self.images, *LIMITS.images)
        check_range("first_image", self.first_image, 0, LIMITS.images[1] - self.images)
        check_range("seed", self.seed, LIMITS.seed[0], LIMITS.seed[1] - self.images - self.first_image + 1)
        if self.batch is not None:
            check_range("batch", self.batch, 1, LIMITS.images[1])
        _check_choice("rng", self.rng, NOISES)
        _check_choice("memory", self.memory, MEMORY)
        if self.sampler is not None:
            _check_choice("sampler", self.sampler, tuple(SAMPLERS))
        if self.spacing is not None:
            _check_choice("spacing", self.spacing, SPACINGS)
        _check_choice("prompt_syntax", self.prompt_syntax, SYNTAXES)
        check_range("clip_skip", self.clip_skip, *LIMITS.clip_skip)
        _check_size(self.size)
        _check_pixels("image", self.image, 3)
        _check_pixels("mask", self.mask, 2)
        self._check_controls()
        if self.mask is not None and self.image is None:
            raise ConfigError("there is a mask and no image; give the image that the mask is for")

    def _check_controls(self) -> None:
        if len(self.controls) > LIMITS.controls:
            raise ConfigError(f"there are {len(self.controls)} controls; at most {LIMITS.controls} act at once")
        for control in self.controls:
            _check_pixels(f"image of control {control.name}", control.image, 3)
        if self.guess and not self.controls:
            raise ConfigError("guess is on, and there is no control that could guess")

    @property
    def reading(self) -> Reading:
        """How its prompts are read."""
        return Reading(self.prompt_syntax, self.clip_skip)


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
    width, height = drawn_size(request, family)
    shape = family.latent_shape(width, height)
    _require_images(request, family)
    steps = family.steps_default if request.steps is None else request.steps
    sampler = _sampler(request, {"prediction_type": family.prediction_type, **scheduler})
    sampler = family.kind.sized(sampler, shape, steps)
    sampler.calls(steps)
    _check_latents(request.latents, (request.images, *shape))
    guidance = family.guidance_default if request.guidance is None or not family.guided else float(request.guidance)
    strength = _strength(request, family)
    begin = sampler.begins_at(strength, steps)
    sampler = sampler.begun(begin)
    return Settled(request, sampler, steps, guidance, (width, height), shape, strength, begin)


def drawn_size(request: Request, family: Family) -> tuple[int, int]:
    """(width, height) of the picture: what is asked for, or the image's rounded down to legal sides, or the model's.

    Raises:
        ConfigError: the image's own size is not one that the model draws.
    """
    if request.size is not None:
        return request.size
    image = request.controls[0].image if request.image is None and request.controls else request.image
    if image is None:
        return family.default_sides
    height, width = image.shape[:2]
    step = family.size_step
    size = width // step * step, height // step * step
    try:
        family.check_size(*size)
    except ConfigError as fault:
        raise ConfigError(
            f"the image has {width}x{height} pixels: {fault}. Give a size, to which it is resized"
        ) from None
    return size


def _strength(request: Request, family: Family) -> float:
    """The share of the noise; 1 without an image."""
    if request.strength is not None:
        return float(request.strength)
    return 1.0 if request.image is None else family.kind.strength_default(family, request.mask is not None)


def _require_images(request: Request, family: Family) -> None:
    """Raises ConfigError or UnsupportedError unless the model draws with the image and mask that are given."""
    if family.fills_masks and (request.image is None or request.mask is None):
        raise ConfigError("the model fills masks: give it both an image and a mask")
    if request.strength is not None and request.image is None:
        raise ConfigError(f"strength is {request.strength:g}, and there is no image to begin with: give one")
    if request.image is not None and not family.kind.begins_with_images:
        raise UnsupportedError(f"models of the kind {family.kind.name} draw from text alone here: leave the image out")
    if request.image is not None and request.mask is None and family.takes_guidance:
        raise UnsupportedError(
            "image-to-image with a model that takes guidance as an input (LCM) is not built: give a mask too, or use "
            "an LCM-LoRA over a plain model"
        )


def _sampler(request: Request, config: Mapping[str, Any]) -> Sampler:
    asked = {"timestep_spacing": request.spacing, "eta": request.eta}
    changed = {key: value for key, value in asked.items() if value is not None}
    made = make_sampler({**config, **changed}, request.sampler)
    if request.spacing is not None and not made.spaced:
        raise ConfigError(f"the {made.name} sampler has timesteps of its own; spacing has no say in it")
    if request.eta is not None and made.eta is None:
        raise ConfigError(f"the {made.name} sampler has no eta; it is for tcd: --sampler tcd")
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


def _check_pixels(name: str, pixels: object, axes: int) -> None:
    """Raises ConfigError unless these are pixels, or None."""
    if pixels is None:
        return
    wanted = "(height, width, 3)" if axes == 3 else "(height, width)"
    if not isinstance(pixels, np.ndarray):
        raise ConfigError(f"the {name} is a {type(pixels).__name__}; it must be a uint8 array {wanted}")
    shape = pixels.shape
    legal = len(shape) == axes and min(shape[:2], default=0) >= 1 and shape[2:] in ((), (3,))
    if pixels.dtype != np.uint8 or not legal:
        raise ConfigError(f"the {name} is {pixels.dtype} {shape}; it must be uint8 {wanted}")


def _check_latents(latents: Array | None, shape: tuple[int, ...]) -> None:
    if latents is None:
        return
    if tuple(latents.shape) != shape:
        raise ConfigError(f"latents have shape {tuple(latents.shape)}; this request needs {shape}")
    if isinstance(latents, np.ndarray) and (latents.dtype.kind != "f" or not np.isfinite(latents).all()):
        raise ConfigError(f"latents are {latents.dtype} and must be finite floats")
