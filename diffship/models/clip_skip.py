"""Clip-skip: a pipeline whose CLIP text encoders also give the states of earlier layers."""

from __future__ import annotations

from dataclasses import replace

from diffship.core.errors import ConfigError
from diffship.models.parts.clip import CLIP_TYPE, layer_count, skipping
from diffship.models.pipeline import Pipeline


def with_clip_skip(pipeline: Pipeline, layers: int | None = None) -> Pipeline:
    """The pipeline with clip-skip up to `layers` (None: as many as each encoder has) in its CLIP text encoders.

    Encoders that give all hidden states anyway (SDXL, SD3) stay as they are. No other output changes.

    Raises:
        ConfigError: no CLIP text encoder is there, or one has fewer layers.
    """
    clips = {name: part for name, part in pipeline.texts.items() if part.text_type == CLIP_TYPE}
    if layers is not None and not clips:
        raise ConfigError(f"clip_skip is {layers}, and no CLIP text encoder is exported: leave it out")
    made = {
        name: skipping(part, layer_count(part.config) if layers is None else layers) for name, part in clips.items()
    }
    return replace(pipeline, components={**pipeline.components, **made})
