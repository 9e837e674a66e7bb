"""What a picture looks like before it is done."""

from __future__ import annotations

import io

from PIL import Image

from diffship.core.errors import PeerError, RunnerError
from diffship.sampling.decode import decode
from diffship.sampling.model import Model
from diffship.sampling.trajectory import Trajectory


def preview(model: Model, trajectory: Trajectory) -> bytes:
    """A PNG of the noisy latents, scaled to unit variance as the model's own input is; empty where there is none."""
    now = trajectory.sampler.coefficients(trajectory.step, trajectory.steps, len(trajectory.history))
    try:
        pixels = decode(model, trajectory.latents * now.input_scale)
    except (RunnerError, PeerError):  # a black image; or the engine died, which the next call finds out
        return b""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
