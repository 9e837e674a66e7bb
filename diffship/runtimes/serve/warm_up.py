"""The first call of every part, which opens it, fills its engine's caches and finds out that it works."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diffship.core.kind import control_names
from diffship.sampling.control import Controlled
from diffship.sampling.decode import decode
from diffship.sampling.encode import encode, text_parts
from diffship.sampling.loop import Denoiser
from diffship.sampling.model import Model
from diffship.sampling.rng import INITIAL, make_noise
from diffship.sampling.solvers.ddim import Ddim
from diffship.sampling.trajectory import Trajectory


def warm_up(model: Model, denoiser: Denoiser) -> None:
    """Encode a prompt, make one call of `denoiser`, one with each ControlNet, and decode, at the model's usual size and
    guidance.

    No sampler steps: the model's own scheduler may be one that is not built, or one that takes no single step. A part
    that is missing is left out, and so is the denoiser's call without a text encoder, whose output it needs.

    Raises:
        RunnerError: an engine does not open a part, or its output is not finite.
    """
    family = model.family
    size = family.default_sides
    latents, noise = make_noise("philox", 0, 0).draw(family.latent_shape(*size), INITIAL)
    if text_parts(model):
        encoded = encode(model, "warm-up", None, size, family.guidance_default)
        start = Trajectory(
            latents=latents,
            step=0,
            steps=1,
            sampler=Ddim(),
            noise=noise,
            size=size,
            guidance=family.guidance_default,
            positive=encoded.positive,
            negative=encoded.negative,
        )
        denoiser([start])
        # each opens its ControlNet, and the first one the denoiser that heeds it
        for name in sorted(control_names(model.parts)):
            seen = np.zeros((3, *reversed(size)), np.float32)
            denoiser([replace(start, controls=(Controlled(name, seen, first=0, stop=1),))])
    if family.kind.decoder in model.parts:
        decode(model, latents)
