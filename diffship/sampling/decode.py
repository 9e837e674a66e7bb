"""Latents to pixels and back, whole or in overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError, RunnerError
from diffship.core.family import Family
from diffship.core.runner import Runner
from diffship.sampling.encode import finite
from diffship.sampling.model import Model
from diffship.sampling.rng import Noise
from diffship.sampling.trajectory import as_numpy

Floats = NDArray[np.float32]
TILE, OVERLAP = 32, 8  # latent pixels; a 512 px image takes nine tiles


def decode(model: Model, latents: Any, tiled: bool = False) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of one image's latents; `tiled` for latents of two spatial axes.

    Raises:
        RunnerError: the decoder's output is not finite, or the picture is black all over.
    """
    family = model.family
    taken = family.kind.decoder_latents(family, as_numpy(latents)[None])
    part = family.kind.decoder
    runner, tiled = model.use(part), tiled and takes_tiles(family, latents)
    picture = decode_tiled(_call(runner), taken, family.kind.decoder_factor(family)) if tiled else _call(runner)(taken)
    pixels = to_pixels(finite(part, picture[0]))
    if not pixels.any():
        raise RunnerError(f"{part}: the picture is black all over. Run diffship verify, or use precision fp32")
    return pixels


def takes_tiles(family: Family, latents: Any) -> bool:
    """Whether the decoder takes more than one tile for latents (channels, height, width), so that tiles change the
    picture.

    Latents of another rank have no tiles.
    """
    taken = family.kind.decoder_latents(family, as_numpy(latents)[None])
    return len(latents.shape) == 3 and bool(max(taken.shape[-2:]) > TILE)


def to_pixels(sample: Floats) -> NDArray[np.uint8]:
    """(3, height, width) in [-1, 1] to uint8 (height, width, 3), rounded as diffusers does."""
    unit = np.clip(sample / np.float32(2) + np.float32(0.5), 0, 1)
    rounded: NDArray[np.float32] = np.round(unit.transpose(1, 2, 0) * np.float32(255))
    return rounded.astype(np.uint8)


def decode_tiled(
    run: Callable[[Floats], Floats], latents: Floats, factor: int, tile: int = TILE, overlap: int = OVERLAP
) -> Floats:
    """Apply `run` to tiles of `tile` latent pixels, and blend them linearly where they overlap.

    The result equals that of the whole if `run` looks less than overlap / 4 latent pixels far, because that rim of each
    tile is not used.
    """
    height, width = latents.shape[-2:]
    total = weight = None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = run(np.ascontiguousarray(latents[..., top : top + tile, left : left + tile]))
            rows = _ramp(top, min(tile, height), height, overlap, factor)
            share = rows[:, None] * _ramp(left, min(tile, width), width, overlap, factor)[None, :]
            if total is None or weight is None:
                total = np.zeros((*part.shape[:-2], height * factor, width * factor), np.float32)
                weight = np.zeros(total.shape[-2:], np.float32)
            where = np.s_[..., top * factor : (top + tile) * factor, left * factor : (left + tile) * factor]
            total[where] += part * share
            weight[where] += share
    assert total is not None and weight is not None  # there is at least one tile
    return np.asarray(total / weight, np.float32)


def moments_of(model: Model, image: NDArray[np.uint8], keep: Floats | None = None) -> Floats:
    """What the encoder gives for `image` (height, width, 3): mean and log variance of its latents, side by side along
    the channels, or the latents themselves (a tiny VAE).

    `keep` (height, width) is 1 for pixels that stay and 0 for pixels that are made grey first; None: all stay.

    Raises:
        RunnerError: they are not finite.
        ConfigError: their number is neither that of the latents' channels nor twice that.
    """
    signed = image.astype(np.float32) / np.float32(127.5) - np.float32(1)
    signed = signed if keep is None else signed * keep[..., None]
    feeds = {"sample": np.ascontiguousarray(signed.transpose(2, 0, 1)[None])}
    part = model.family.kind.encoder
    parameters = finite(part, as_numpy(model.use(part).run(feeds)["latent_parameters"])[0])
    channels = model.family.latent_channels
    if len(parameters) not in (channels, 2 * channels):
        raise ConfigError(f"{part} gives {len(parameters)} channels; {channels} or {2 * channels} are known")
    return parameters


def sampled(family: Family, moments: Floats, noise: Noise, draw: int) -> tuple[Floats, Noise]:
    """(scaled latents, noise source after the draw) of `moments_of`; `draw` names the draw of noise.

    A KL encoder's posterior is sampled (Kingma and Welling 2014), as diffusers does; a tiny VAE's latents need no draw.
    """
    channels = family.latent_channels
    latents = moments[:channels]
    if len(moments) == 2 * channels:
        deviation = np.exp(np.float32(0.5) * np.clip(moments[channels:], -30, 20))
        drawn, noise = noise.draw(latents.shape, draw)
        latents = latents + deviation * drawn
    return (latents - np.float32(family.shift_factor)) * np.float32(family.scaling_factor), noise


def _call(runner: Runner) -> Callable[[Floats], Floats]:
    return lambda latents: as_numpy(runner.run({"latent_sample": latents})["sample"])


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Evenly spaced tile starts, the last flush with the end."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(start: int, tile: int, size: int, overlap: int, factor: int) -> Floats:
    """Weight of each pixel of a tile along one axis: 0 on the rim, linear over the overlap, 1 inside and at borders."""
    rim, slope = overlap // 4 * factor, max((overlap - 2 * (overlap // 4)) * factor, 1)
    distance = np.arange(tile * factor, dtype=np.float32) + np.float32(0.5)
    rising = np.ones_like(distance) if start == 0 else (distance - rim) / slope
    falling = np.ones_like(distance) if start + tile >= size else (distance[::-1] - rim) / slope
    return np.clip(np.minimum(rising, falling), 0, 1).astype(np.float32)
