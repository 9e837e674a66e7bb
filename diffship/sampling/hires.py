"""A second pass at a higher resolution: the picture is enlarged and drawn on from there, as image-to-image.

A model that was trained on pictures of one size repeats things in larger ones; it does not if a small picture says
already where everything is.
"""

from __future__ import annotations

from dataclasses import replace

from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.limits import LIMITS, check_range
from diffship.sampling.picture import Picture
from diffship.sampling.request import Request

STRENGTH = 0.5  # keeps the composition, and draws details anew


def enlarged(request: Request, picture: Picture, place: int, family: Family, scale: float, strength: float) -> Request:
    """The request of the second pass over `picture`, image number `place` of `request`.

    Its sides are `scale` times those of the picture, rounded down to what the model draws. The picture is resized by
    Lanczos's filter (`Request.image`), and `strength` is the share of the noise.

    Raises:
        ConfigError: a scale out of range, a size that the model cannot draw, or a mask, which the second pass would
            not keep to.
    """
    check_range("hires", scale, *LIMITS.hires)
    if request.mask is not None:
        raise ConfigError("hires draws the whole picture anew, also where the mask keeps it: leave one of them out")
    height, width = picture.pixels.shape[:2]
    step = family.size_step
    size = int(width * scale) // step * step, int(height * scale) // step * step
    family.check_size(*size)
    return replace(
        request,
        image=picture.pixels,
        size=size,
        strength=strength,
        seed=request.seed + request.first_image + place,
        images=1,
        first_image=0,
        latents=None,
    )
