"""Load options: how the weights of a source are read, beside what the source says itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffship.core.strict import bounded, choices

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
@bounded
class LoadOptions:
    """What whoever opens a source may ask for.

    vae: a source whose auto-encoder takes the place of the model's own. The others are for checkpoints in one file.
    ema: take the averaged weights of the denoiser, which training keeps beside the last ones. prediction: what the
    denoiser's output means, if the file does not say it, or not rightly.
    """

    vae: str | None = None
    ema: bool = False
    prediction: str | None = field(default=None, metadata=choices(*PREDICTIONS))


AS_SAID = LoadOptions()  # as the source says
