"""What the tests of structural pruning have in common: a small model, pictures, and what a U-Net gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffship.compress import compress
from diffship.compression.layout import LayoutPass
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source

SIZES = {"batch_size": 2, "height": 8, "width": 8, "sequence_length": 5}


@cache
def small_model() -> Pipeline:
    """Every kind of layer, and half as many as the whole tiny U-Net has."""
    return compress(open_source("arch:tiny-sd"), [LayoutPass("bk-tiny")])


def with_pictures(folder: Path) -> Path:
    """Four pictures with captions."""
    rng = np.random.Generator(np.random.PCG64(0))
    for place in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(f"noise number {place}")
    return folder


def outputs(component: Component) -> NDArray[np.generic]:
    return np.asarray(component.load().run(component.example(0, SIZES))["out_sample"])
