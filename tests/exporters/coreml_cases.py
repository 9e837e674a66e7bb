"""A pipeline small enough for coremltools, which takes a second for each hundred operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from diffship.core.bundle import Bundle
from diffship.core.seeded import SeededWeights
from diffship.core.weights import TensorMeta
from diffship.models.parts.autoencoder import KL, Decoder, Encoder, autoencoder
from diffship.models.parts.component import Component, weight_metas
from diffship.models.parts.unet import UNet, unet
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.runtimes.engines.shell import open_runner

UNET: dict[str, Any] = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}


def small_pipeline(**changes: Any) -> Pipeline:
    """`arch:tiny-sd` with a U-Net of one level and a thinner VAE; `changes` go into the U-Net's config."""
    pipeline = open_source("arch:tiny-sd")
    config = {**pipeline.components["unet"].config, **UNET, **changes}
    small = unet(config, _seeded(partial(UNet, config)), 8)
    thin = {**pipeline.components["vae_decoder"].config, "layers_per_block": 1}
    halves = autoencoder(KL, thin, _seeded(partial(Encoder, KL, thin), partial(Decoder, KL, thin)))
    parts = {"unet": small, **{half.name: half for half in halves}}
    return replace(pipeline, components={**pipeline.components, **parts})


def _seeded(*builds: Callable[[], torch.nn.Module]) -> SeededWeights:
    metas: dict[str, TensorMeta] = {}
    with torch.device("meta"):
        for build in builds:
            metas.update(weight_metas(build()))
    return SeededWeights(metas, 5)


def decibels(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal to noise ratio; the peak is the largest absolute value that is wanted."""
    error = float(np.square(found.astype(np.float64) - wanted).mean())
    return float("inf") if error == 0 else 20 * np.log10(float(np.abs(wanted).max())) - 10 * np.log10(error)


def computed(bundle: Bundle, part: str, arithmetic: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the interpreter makes of a part."""
    with open_runner(bundle, part, "mil", arithmetic=arithmetic) as runner:
        return runner.run(feeds)


def of_torch(held: Component, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What torch makes of it in float32, with its weights as float16 stores them."""
    with held.load() as runner:
        for tensor in runner._module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())
        return {name: np.asarray(array) for name, array in runner.run(feeds).items()}
