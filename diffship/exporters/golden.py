"""Golden vectors: inputs and fp32 torch outputs of one call, so that any engine can prove a part again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffship.core.compare import Tolerance
from diffship.core.dtype import meta_of
from diffship.core.errors import SourceError
from diffship.core.manifest import Golden
from diffship.core.safetensors_file import write_safetensors
from diffship.models.component import Component

SEED = 20
# two samples at different timesteps: one value for the whole batch would not show a graph that ignores the second
BATCH = 2
TOLERANCES = {
    "fp32": Tolerance(atol=1e-4, rtol=1e-3, psnr_db=60.0),
    "fp16": Tolerance(psnr_db=35.0),
    "bf16": Tolerance(psnr_db=30.0),
}
Arrays = dict[str, NDArray[np.generic]]


def write_golden(component: Component, sizes: Mapping[str, int], out: Path, precision: str, max_bytes: int) -> Golden:
    """`golden/<part>.safetensors` below `out` at `sizes` (by axis), with at most `max_bytes` of weights loaded.

    Feeds are rounded to the type of the graph's inputs, so that both sides see the same ones.

    Raises:
        SourceError: torch itself gives NaN or infinity.
    """
    feeds = {
        name: array if name == "timestep" else _rounded(array, precision)
        for name, array in component.example(SEED, sizes).items()
    }
    outputs = reference(component, feeds, max_bytes)
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise SourceError(f"{component.name}: torch itself gives NaN or infinity in {name}; the source is damaged")
    tensors = {f"in.{name}": array for name, array in feeds.items()}
    tensors |= {f"out.{name}": array for name, array in outputs.items()}
    file = f"golden/{component.name}.safetensors"
    (out / "golden").mkdir(exist_ok=True)
    write_safetensors(out / file, {name: meta_of(array) for name, array in tensors.items()}, tensors.__getitem__)
    return Golden(file, dict(sizes), TOLERANCES[precision])


def reference(component: Component, feeds: Arrays, max_bytes: int) -> Arrays:
    """fp32 outputs of torch, stage by stage where the weights take more than `max_bytes` in fp32."""
    count = sum(component.weights.meta(name).count for name in component.weights.names())
    if 4 * count <= max_bytes:
        return _run(component, feeds)
    from diffship.models.stages import stages_forward

    return stages_forward(component, feeds, max_bytes)


def _run(component: Component, feeds: Arrays) -> Arrays:
    with component.load() as runner:
        return {name: np.asarray(array) for name, array in runner.run(feeds).items()}


def _rounded(array: NDArray[np.generic], precision: str) -> NDArray[np.generic]:
    if precision != "fp16" or array.dtype.kind != "f":
        return array
    return array.astype(np.float16).astype(array.dtype)
