"""A bundle of three small files, written the way the exporters write theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffship.core.bundle import Bundle, Golden, Manifest, Part, write_bundle
from diffship.core.compare import Tolerance
from diffship.core.dtype import TensorMeta
from diffship.core.family import Family
from diffship.core.safetensors_file import write_safetensors
from diffship.core.spec import TensorSpec


@pytest.fixture
def manifest() -> Manifest:
    latents = TensorSpec("sample", "float32", ("batch_size", 4, "height", "width"))
    part = Part(
        "unet",
        ("unet/weights.safetensors", "unet/config.json"),
        (latents,),
        (TensorSpec("out_sample", "float32", ("batch_size", 4, "height", "width")),),
        "fp32",
        "0" * 64,
        golden=Golden("golden/unet.safetensors", {"batch_size": 1, "height": 8, "width": 8}, Tolerance(1e-4, 1e-3)),
    )
    return Manifest("sample", Family("sd"), (part,), source={"id": "arch:tiny-sd"}, licence={"id": "mit"})


@pytest.fixture
def fill() -> Callable[[Path, int], None]:
    def write(folder: Path, value: int = 0) -> None:
        (folder / "unet").mkdir()
        (folder / "golden").mkdir()
        array = np.full((64, 32), value, np.float32)
        for name in ("unet/weights.safetensors", "golden/unet.safetensors"):
            write_safetensors(folder / name, {"w": TensorMeta("float32", array.shape)}, lambda _: array)
        (folder / "unet/config.json").write_text(f'{{"value": {value}}}')

    return write


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest, fill: Callable[[Path, int], None]) -> Bundle:
    with write_bundle(tmp_path / "bundle") as draft:
        fill(draft.folder, 1)
        return draft.finish(manifest)
