"""A golden trajectory: a few denoising steps in fp32 torch, so that another host can see errors grow step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.compare import Tolerance
from diffship.core.dtype import meta_of
from diffship.core.errors import ConfigError, SourceError, UnsupportedError
from diffship.core.manifest import GoldenTrajectory
from diffship.core.precision import Precision
from diffship.core.safetensors_file import write_safetensors
from diffship.exporters.gated import GatedModel
from diffship.exporters.golden import SEED
from diffship.exporters.tolerances import limit, loosest
from diffship.models.pipeline import Pipeline
from diffship.sampling.encode import text_parts
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import denoiser_of, latents_by_step
from diffship.sampling.request import settle
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import pack

PROMPT, NEGATIVE = "a photograph of an apple on a table", "blurry"
START, LATENTS = "golden/trajectory.safetensors", "golden/latents.safetensors"


def write_trajectory(
    pipeline: Pipeline, sizes: Mapping[str, int], out: Path, steps: int, precision: Precision, max_bytes: int
) -> GoldenTrajectory:
    """Draw `steps` steps of `pipeline`, and write below `out` where they start and the latents after each.

    A denoiser with packed weights draws as `precision` is simulated.

    sizes: of the denoiser by axis; a `batch_size` of 1 draws without classifier-free guidance, which takes two rows. At
    most `max_bytes` of weights are loaded at once.

    Raises:
        ConfigError: a number of steps that the sampler does not take.
        SourceError: torch itself gives NaN or infinity.
    """
    size = pipeline.family.kind.picture_size(pipeline.family, sizes)
    model = GatedModel(pipeline, max_bytes)
    try:
        guidance = None if sizes["batch_size"] > 1 or pipeline.family.takes_guidance else 1.0
        request = Request(PROMPT, NEGATIVE, steps, guidance, size, SEED, "philox", **_picture(pipeline, size))
        (trajectory,) = start(model, request)
        for part in (*text_parts(model), model.family.kind.encoder):
            model.release(part)
        found = _drawn(trajectory, GatedModel(pipeline, max_bytes, precision) if precision.simulated else model)
        formatted = found
        if precision.inputs or precision.exact:
            formatted = _drawn(trajectory, GatedModel(pipeline, max_bytes, precision, moved=True))
        elif not precision.simulated:
            formatted = _drawn(trajectory, GatedModel(pipeline, max_bytes, precision))
    finally:
        model.close()
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise SourceError(f"torch itself gives NaN or infinity at {name} of a trajectory; the source is damaged")
    (out / "golden").mkdir(exist_ok=True)
    (out / START).write_bytes(pack(trajectory))
    write_safetensors(out / LATENTS, {name: meta_of(array) for name, array in found.items()}, found.__getitem__)
    limits = [limit(precision, array, formatted[name]) for name, array in found.items()]
    # errors add up over the steps, and elements near zero say nothing: so PSNR of the whole decides
    return GoldenTrajectory(START, LATENTS, Tolerance(psnr_db=loosest(limits).psnr_db))


def _drawn(trajectory: Trajectory, model: GatedModel) -> dict[str, Any]:
    """Latents after each step; the weights that this loads are freed with `model`."""
    return latents_by_step(trajectory, denoiser_of(model))


def why_not(pipeline: Pipeline, sizes: Mapping[str, int], steps: int = 0) -> str:
    """Why the source, or an engine that takes `sizes`, has no trajectory of `steps` steps; empty if it has one."""
    kind = pipeline.family.kind
    encoder = (kind.encoder,) if pipeline.family.fills_masks else ()
    missing = {kind.denoiser, kind.decoder, *encoder} - set(pipeline.components)
    if missing or not pipeline.texts:
        return f"the source has no {', '.join(sorted(missing)) or 'text encoder'}; --base can supply it"
    size = kind.picture_size(pipeline.family, sizes)
    try:
        pipeline.family.check_size(*size)
    except ConfigError as fault:
        return f"the engine's least shapes are not a legal picture size: {fault}"
    try:
        if steps:
            request = Request(PROMPT, steps=steps, size=size, **_picture(pipeline, size))
            settle(request, pipeline.family, pipeline.scheduler)
    except (ConfigError, UnsupportedError) as fault:
        return f"the model's own scheduler does not draw it: {fault}"
    return "" if sizes["batch_size"] in (1, 2) else f"{kind.denoiser} takes neither one row nor two"


def _picture(pipeline: Pipeline, size: tuple[int, int]) -> dict[str, Any]:
    """`image` and `mask` of a request: a grey ramp whose right half is to be drawn, for models that fill masks; with
    all of the noise, so that every step counts."""
    if not pipeline.family.fills_masks:
        return {}
    width, height = size
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    image = np.repeat(np.repeat(ramp[None, :, None], height, 0), 3, 2)
    mask = np.repeat(np.where(np.arange(width) < width // 2, 0, 255).astype(np.uint8)[None], height, 0)
    return {"image": image, "mask": mask, "strength": 1.0}
