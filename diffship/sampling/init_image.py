"""How a picture begins with an image: image-to-image, and inpainting by models that read a mask and by those that do
not.

Draws of noise are in the order of diffusers' pipelines of the same names: the image's posterior, the noise, then the
posterior of the masked image, even if nobody reads that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffship.core.brief import brief
from diffship.sampling.control import Controlled
from diffship.sampling.decode import moments_of, sampled
from diffship.sampling.kernel import Array
from diffship.sampling.model import Model
from diffship.sampling.request import Settled
from diffship.sampling.rng import INITIAL, VAE_STEP, WHOLE_STEP, Noise
from diffship.sampling.trajectory import as_numpy

_HALF = 128  # grey from which on a mask counts as 1
_SAME_SHAPE = 0.02  # by which width / height may change before a warning says so
Pixels = NDArray[np.uint8]


@brief
@dataclass(frozen=True, eq=False)
class Canvas:
    """The image of a request, and its mask if there is one, in the size of the picture.

    image: uint8 (height, width, 3). mask: float32 (height, width), 1 where the picture is drawn and 0 where the image
    stays. warnings: what was done to them.
    """

    image: Pixels
    mask: NDArray[np.float32] | None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, settled: Settled) -> Canvas | None:
        """That of a settled request; None if it has no image."""
        image, mask = settled.request.image, settled.request.mask
        if image is None:
            return None
        told = [*_resizing("image", image, settled.size)]
        if mask is None:
            return cls(_resized(image, settled.size), None, tuple(told))
        told += _resizing("mask", mask, settled.size)
        drawn = (_resized(mask, settled.size) >= _HALF).astype(np.float32)
        if not drawn.any():
            told.append("the mask covers nothing: no pixel of it is brighter than half, so the image stays as it is")
        return cls(_resized(image, settled.size), drawn, tuple(told))


def begun(model: Model, settled: Settled, place: int, source: Noise, canvas: Canvas | None) -> dict[str, Any]:
    """Fields of the trajectory of image number `place` before its first call, which depend on noise and image.

    `source` is the noise as it was seeded. Latents that the request gives count as noise.
    """
    given, mask = settled.request.latents, None if canvas is None else canvas.mask
    # with a mask and all the noise, stock pipelines begin with noise alone; without one, they never do
    pure = canvas is None or (mask is not None and (settled.strength == 1.0 or given is not None))
    clean = moments = None
    if canvas is not None and not (pure and model.family.fills_masks):
        moments = moments_of(model, canvas.image)
        clean, source = sampled(model.family, moments, source, WHOLE_STEP)
    if given is None:
        noise, source = source.draw(settled.latent_shape, INITIAL)
    else:
        noise = as_numpy(given[place - settled.request.first_image])
    fields: dict[str, Any] = {"latents": _first(settled, noise, None if pure else clean)}
    if canvas is not None and mask is not None:
        fields["mask"] = np.ascontiguousarray(mask[None, :: model.family.vae_factor, :: model.family.vae_factor])
        if model.family.fills_masks:
            masked = moments_of(model, canvas.image, 1 - mask)
            fields["masked_latents"], source = sampled(model.family, masked, source, VAE_STEP)
        elif moments is not None:
            fields |= {"init_latents": clean, "init_noise": noise}
            # what comes next in the noise's stream is stock's only after this draw, whose latents nobody reads
            _, source = sampled(model.family, moments, source, VAE_STEP)
    return {**fields, "noise": source}


def controlled(settled: Settled) -> tuple[tuple[Controlled, ...], tuple[str, ...]]:
    """The controls of a settled request in the size of the picture, and warnings."""
    request, calls = settled.request, settled.sampler.calls(settled.steps)
    made: list[Controlled] = []
    told: list[str] = []
    for control in request.controls:
        told += _resizing(f"image of control {control.name}", control.image, settled.size)
        first, stop = control.acts(settled.begin, calls)
        if first == stop:
            told.append(f"control {control.name} acts on no call: none of {calls} lies between its start and its end")
        pixels = _resized(control.image, settled.size).transpose(2, 0, 1).astype(np.float32)
        made.append(Controlled(control.name, pixels, float(control.scale), first, stop, request.guess))
    return tuple(made), tuple(told)


def _first(settled: Settled, noise: NDArray[np.float32], clean: NDArray[np.float32] | None) -> Array:
    """The latents before the first call: noise alone, or an image's latents under noise."""
    if clean is None:
        return noise * np.float32(settled.sampler.init_noise_sigma(settled.steps))
    kept, added = map(np.float32, settled.sampler.noising(settled.begin, settled.steps))
    return clean * kept + noise * added


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Pixels of (width, height), by Lanczos as diffusers' VaeImageProcessor."""
    if pixels.shape[1::-1] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _resizing(name: str, pixels: Pixels, size: tuple[int, int]) -> Sequence[str]:
    """A warning if `_resized` changes anything."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return ()
    stretched = abs(width / height * size[1] / size[0] - 1) > _SAME_SHAPE
    shape = "; its proportions change" if stretched else ""
    return (f"the {name} has {width}x{height} pixels and is resized to {size[0]}x{size[1]}{shape}",)
