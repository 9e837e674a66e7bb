from __future__ import annotations

import hashlib
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from diffship.core.errors import ConfigError
from diffship.core.weights import SafetensorsWeights
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.sampling.generate import generate
from diffship.sampling.model import Model
from diffship.sampling.request import Request


@cache
def arch(name: str) -> Pipeline:
    return open_source(f"arch:{name}")


@pytest.mark.slow
def test_parts_are_loaded_once_and_released() -> None:
    with PipelineModel(arch("tiny-sd")) as model:
        first = model.use("unet")
        assert model.use("unet") is first
        model.release("unet")
        model.release("unet")
        assert model.use("unet") is not first
        with pytest.raises(ConfigError, match="no part 'controlnet'"):
            model.use("controlnet")


@pytest.mark.slow
def test_digest_covers_every_part() -> None:
    model: Model = PipelineModel(arch("tiny-sd"))
    lines = "".join(f"{name} {component.digest}\n" for name, component in sorted(arch("tiny-sd").components.items()))
    assert model.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert model.digest != PipelineModel(arch("tiny-sd+taesd")).digest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl+taesd", "tiny-lcm"])
def test_a_picture_on_torch(name: str) -> None:
    model = PipelineModel(arch(name))
    request = Request(prompt="a red apple", steps=2, size=(64, 64), seed=3)
    first, second = (generate(model, request)[0].pixels for _ in range(2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert first.std() > 0


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that was written a while ago, and a cache of its own."""
    monkeypatch.setenv("DIFFSHIP_CACHE", str(tmp_path / "cache"))
    folder = save(arch("tiny-sd"), tmp_path / "model")
    for file in folder.rglob("*.safetensors"):
        os.utime(file, ns=(0, time.time_ns() - 10**11))
    return folder


def test_weights_are_hashed_once_while_their_files_stay(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PipelineModel(open_source(str(saved)))
    assert first.digests == PipelineModel(arch("tiny-sd")).digests  # of the seed, and of files: the same tensors
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWeights, "read", lambda *_: pytest.fail("a tensor was read"))
        assert PipelineModel(open_source(str(saved))).digest == first.digest
    # another U-Net of the same size, a while ago
    file = next((saved / "unet").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(0, time.time_ns() - 10**10))
    changed = open_source(str(saved))
    assert PipelineModel(changed).digests["unet"] == changed.components["unet"].digest != first.digests["unet"]
    assert PipelineModel(changed).digests["text_encoder"] == first.digests["text_encoder"]


def test_a_file_of_this_moment_and_a_damaged_cache_are_not_trusted(saved: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "digests"
    for file in (saved / "unet").glob("*.safetensors"):
        os.utime(file)
    pipeline = open_source(str(saved))
    digests = PipelineModel(pipeline).digests
    assert digests == {name: part.digest for name, part in pipeline.components.items()}
    assert len(list(kept.iterdir())) == len(digests) - 1
    for file in kept.iterdir():
        file.write_text("half")
    assert PipelineModel(open_source(str(saved))).digests == digests


def test_a_home_that_cannot_be_written_to_is_no_fault(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert PipelineModel(open_source(str(saved))).digests["unet"] == arch("tiny-sd").components["unet"].digest
