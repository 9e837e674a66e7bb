"""Feeds of golden vectors that a part meets in use: real text embeddings, latents at two noise levels, prompts.

Unit normals in place of text embeddings hide faults of the cross-attention: attention to normal keys is nearly even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.kind import CONTROL_IMAGE
from diffship.exporters.gated import GatedModel
from diffship.exporters.golden import SEED
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.sampling.encode import encode
from diffship.sampling.trajectory import Conditioning

PROMPTS = (
    "a photograph of an apple on a table",
    # 77 tokens, so that every position of the text is used
    "an oil painting of two red foxes and a small grey rabbit that sit beside a river under tall old trees in the "
    "evening light of a cold autumn day, with mist over the water, yellow leaves on the ground, a wooden bridge, "
    "snow on the mountains far behind them, a full moon in the clouds, highly detailed, soft shadows, warm colours, "
    "wide view, masterpiece, by a famous old master",
)
TIMESTEPS = ((981.0, 701.0), (241.0, 21.0))  # by call and sample: two noise levels, no two samples alike
_GUIDANCE = 7.5
Arrays = dict[str, NDArray[np.generic]]


class GoldenFeeds:
    """Feeds for the parts of one pipeline; prompts are encoded once, with at most `max_bytes` of weights loaded."""

    def __init__(self, pipeline: Pipeline, max_bytes: int) -> None:
        self._pipeline = pipeline
        self._kind = pipeline.family.kind
        self._max_bytes = max_bytes
        self._encoded: dict[tuple[int, int], list[Conditioning]] = {}

    def calls(self, component: Component, sizes: Mapping[str, int]) -> list[Arrays]:
        """The feeds of each golden call of `component` at `sizes` (by axis): two calls of a denoiser or a ControlNet,
        one of others.

        A part of another kind (a stage) gets the example feeds that it states itself.
        """
        kind = self._kind
        if component.name in kind.text_parts:
            return [self._tokens(component, sizes)]
        if kind.denoises(component.name):
            return [self._denoising(component, sizes, call) for call in range(len(TIMESTEPS))]
        if component.name in (kind.encoder, kind.decoder):
            return [self._pictures(component, sizes)]
        return [component.example(SEED, sizes)]

    def inside(self, component: Component, sizes: Mapping[str, int]) -> Arrays:
        """What the blocks of `component` are proved on: its first call, and tokens of the whole vocabulary beside it.

        Prompts read a hundred rows of a table that has fifty thousand. Whole parts are not tried on such tokens: words
        that no text has let the error of a format grow from layer to layer as no prompt does.
        """
        first = self.calls(component, sizes)[0]
        if component.name not in self._kind.text_parts:
            return first
        spread = _spread(component, sizes)
        return {name: np.concatenate([array, spread[name]]) for name, array in first.items()}

    def _tokens(self, component: Component, sizes: Mapping[str, int]) -> Arrays:
        name = self._kind.tokenizer_of(component.name)
        known = {**component.smallest, **sizes}
        tokens = GatedModel(self._pipeline, self._max_bytes).tokenizers.get(name)
        if tokens is None or known["sequence_length"] != len(tokens([""]).ids[0]):
            return component.example(SEED, sizes)
        return dict(tokens([PROMPTS[i % len(PROMPTS)] for i in range(known["batch_size"])]).feeds())

    def _pictures(self, component: Component, sizes: Mapping[str, int]) -> Arrays:
        """Smooth pictures in [-1, 1] for an encoder, smooth latents of the family's scale for a decoder."""
        (spec,) = component.inputs
        shape = spec.resolve({**component.smallest, **sizes})
        smooth = _smooth(shape, SEED)
        family = self._pipeline.family
        if component.name == self._kind.encoder:
            return {spec.name: np.tanh(smooth)}
        return {spec.name: (smooth / family.scaling_factor + family.shift_factor).astype(np.float32)}

    def _denoising(self, component: Component, sizes: Mapping[str, int], call: int) -> Arrays:
        known = {**component.smallest, **sizes}
        rows = known["batch_size"]
        feeds: Arrays = component.example(SEED + call, sizes)
        times = np.resize(np.array(TIMESTEPS[call], np.float32), rows)
        feeds[self._kind.time_input] = times
        kind, name, size = self._kind, self._kind.sample_input, self._kind.picture_size(self._pipeline.family, known)
        shape = kind.latent_shape(self._pipeline.family, *size)
        latents = self._latents(kind.unpack_output(feeds[name], shape), times, SEED + call)
        feeds[name] = np.stack([kind.pack_latents(row) for row in latents])
        if CONTROL_IMAGE in feeds:
            feeds[CONTROL_IMAGE] = (np.tanh(_smooth(feeds[CONTROL_IMAGE].shape, SEED + call)) + 1) / 2
        conditions = [self._conditions(size)[row % len(PROMPTS)] for row in range(rows)]
        for name in self._kind.condition_names:
            arrays = [condition[name] for condition in conditions if name in condition]
            if name in feeds and arrays and feeds[name].shape[1:] == arrays[0].shape:
                feeds[name] = np.stack(arrays).astype(np.float32)
        feeds |= kind.position_inputs(component.inputs, shape, {name: feed[0] for name, feed in feeds.items()})
        return {**feeds, **self._kind.guidance_inputs(component.inputs, [_GUIDANCE - row for row in range(rows)])}

    def _latents(self, noise: NDArray[Any], times: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
        """sqrt(a) z + sqrt(1 - a) noise, with sqrt(a) = cos(pi t / 2000); masks and masked latents are smooth too."""
        level = np.cos(math.pi / 2 * times / 1000.0).reshape(-1, *[1] * (noise.ndim - 1))
        family, clean = self._pipeline.family, _smooth(noise.shape, seed)
        mixed = level * clean + np.sqrt(1 - level**2) * noise
        if family.fills_masks:
            mixed[:, family.latent_channels] = clean[:, family.latent_channels] > 0
            mixed[:, family.latent_channels + 1 :] = clean[:, family.latent_channels + 1 :]
        latents: NDArray[np.float32] = mixed.astype(np.float32)
        return latents

    def _conditions(self, size: tuple[int, int]) -> Sequence[Conditioning]:
        """The conditioning of each prompt; empty ones if the pipeline has no text encoder."""
        if size not in self._encoded:
            model = GatedModel(self._pipeline, self._max_bytes)
            try:
                if not set(self._kind.text_parts) & model.parts:
                    return [Conditioning({}) for _ in PROMPTS]
                self._encoded[size] = [encode(model, prompt, None, size, 1.0).positive for prompt in PROMPTS]
            finally:
                model.close()
        return self._encoded[size]


def _spread(component: Component, sizes: Mapping[str, int]) -> Arrays:
    """Tokens from the whole vocabulary, evenly."""
    spec, *others = component.inputs
    shape = spec.resolve({**component.smallest, **sizes})
    masks = {other.name: np.ones(shape, np.int64) for other in others}
    ids = np.linspace(0, component.config["vocab_size"] - 1, math.prod(shape)).round()
    # consecutive tokens of a row are far apart
    return {spec.name: np.ascontiguousarray(ids.reshape(shape[::-1]).T).astype(spec.dtype), **masks}


def _smooth(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Seeded waves of unit variance, other ones in every channel, none alike along two axes; shape: batch, channels,
    then one axis or more of space."""
    rng = np.random.Generator(np.random.PCG64(seed))
    places = np.meshgrid(*(np.arange(side) / side for side in shape[2:]), indexing="ij")
    total = np.zeros(shape)
    for _ in range(6):
        lows = (0.5, *[-4] * (len(places) - 1), 0)  # along each axis, and the phase
        *waves, phase = (rng.uniform(low, 4, shape[:2]).reshape(*shape[:2], *[1] * len(places)) for low in lows)
        turns = sum(wave * place for wave, place in zip(waves, places, strict=True))
        total += np.sin(2 * math.pi * turns + phase * math.pi)
    smooth: NDArray[np.float32] = (total / np.sqrt(3)).astype(np.float32)
    return smooth
