"""What a picture looks like before it is done, if decoding is cheap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import PeerError, RunnerError
from diffship.sampling.decode import decode
from diffship.sampling.model import Model
from diffship.sampling.trajectory import Trajectory


def preview(model: Model, trajectory: Trajectory) -> NDArray[np.uint8] | None:
    """Pixels of the noisy latents, scaled to unit variance as the model's own input is; None if there are none."""
    now = trajectory.sampler.coefficients(trajectory.step, trajectory.steps, len(trajectory.history))
    try:
        return decode(model, trajectory.latents * now.input_scale)
    except (RunnerError, PeerError):  # a black image; or the engine died, which the next call finds out
        return None
