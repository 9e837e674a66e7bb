"""Opening a source with the auto-encoder of another one, which is tried before it is believed."""

from __future__ import annotations

from dataclasses import replace

from diffship.compression.swap_vae import require_same_latents
from diffship.core.errors import SourceError
from diffship.core.load_options import LoadOptions
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source


def open_tried(source: str, base: str | None, revision: str | None, loading: LoadOptions) -> Pipeline:
    """`open_source`. If `loading` names a VAE, both it and the model's own one decode the same latents: the shapes of
    SD's VAE and of SDXL's are equal, and their latents are not.

    Raises:
        SourceError, UnsupportedError: as open_source.
        ConfigError: the two make other pictures of the same latents.
    """
    pipeline = open_source(source, base=base, revision=revision, loading=loading)
    if loading.vae is None:
        return pipeline
    try:
        own = open_source(source, base=base, revision=revision, loading=replace(loading, vae=None))
    except SourceError:  # it has none, and there is nothing to compare with
        return pipeline
    require_same_latents(own, pipeline)
    return pipeline
