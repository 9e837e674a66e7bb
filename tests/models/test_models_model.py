from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import pytest

from diffship.core.errors import ConfigError
from diffship.models.pipeline import Pipeline
from diffship.models.sources import open_source
from diffship.sampling.generate import generate
from diffship.sampling.model import Model
from diffship.sampling.request import Request


@cache
def arch(name: str) -> Pipeline:
    return open_source(f"arch:{name}")


def test_parts_are_loaded_once_and_released() -> None:
    with arch("tiny-sd").model() as model:
        first = model.use("unet")
        assert model.use("unet") is first
        model.release("unet")
        model.release("unet")
        assert model.use("unet") is not first
        with pytest.raises(ConfigError, match="no part 'controlnet'"):
            model.use("controlnet")


def test_digest_covers_every_part() -> None:
    model: Model = arch("tiny-sd").model()
    lines = "".join(f"{name} {component.digest}\n" for name, component in sorted(arch("tiny-sd").components.items()))
    assert model.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert model.digest != arch("tiny-sd+taesd").model().digest


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl+taesd", "tiny-lcm"])
def test_a_picture_on_torch(name: str) -> None:
    model = arch(name).model()
    request = Request(prompt="a red apple", steps=2, size=(64, 64), seed=3)
    first, second = (generate(model, request)[0].pixels for _ in range(2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert first.std() > 0
