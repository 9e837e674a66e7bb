"""Example feeds by canonical name: values of the kind that a part meets in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.core.spec import TensorSpec
from diffship.models.parts.clip_names import LEGACY_END, end_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

_TIMESTEPS = (999.0, 500.0, 250.0, 1.0)


def draw(
    spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator, config: Mapping[str, Any]
) -> NDArray[np.generic]:
    """An array for `spec`: legal token ids, real timesteps, pixels in [-1, 1], unit normals for everything else."""
    shape = spec.resolve(sizes)
    if spec.name == "input_ids":
        return _token_ids(shape, rng, config)
    if spec.name == "attention_mask":
        lengths = rng.integers(1, shape[1] + 1, (shape[0], 1))
        return (np.arange(shape[1]) < lengths).astype(np.int64)
    if spec.name == "timestep":
        return np.resize(np.array(_TIMESTEPS, np.float32), shape)
    if spec.name == "time_ids":
        return _time_ids(shape, rng)
    if spec.name == "sample" and shape[1] == 3:
        return rng.uniform(-1, 1, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32)


def _token_ids(shape: tuple[int, ...], rng: np.random.Generator, config: Mapping[str, Any]) -> NDArray[np.int64]:
    # CLIP's layout: start, words, then end up to the full length (the specials are the last two ids)
    size = int(config["vocab_size"])
    ids = rng.integers(0, size - 2, shape, np.int64)
    ids[:, 0] = size - 2
    ends = rng.integers(1, shape[1], shape[0]) if shape[1] > 1 else np.zeros(shape[0], np.int64)
    end = end_id(config)
    ids[np.arange(shape[1])[None, :] >= ends[:, None]] = size - 1 if end == LEGACY_END or end >= size else end
    return ids


def _time_ids(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    # original height and width, crop top and left, then the target size (6) or an aesthetic score (5)
    row = [1024.0, 1024.0, 0.0, 0.0, *([1024.0, 1024.0] if shape[1] == 6 else [6.0] * (shape[1] - 4))]
    crops = rng.integers(0, 64, (shape[0], 2)).astype(np.float32)
    rows = np.tile(np.array(row, np.float32), (shape[0], 1))
    rows[:, 2:4] = crops
    return rows
