"""SDXL's base and refiner as one run, against diffusers' `denoising_end` and `denoising_start`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.runtimes.handoff.pair import check_pair
from diffship.runtimes.handoff.router import Router, begin, draw
from diffship.sampling.request import Request

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffship.models.model import PipelineModel  # noqa: E402
from diffship.models.saving import save  # noqa: E402
from diffship.models.sources.opening import open_source  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PROMPT, NEGATIVE = "a red apple!", "blurry"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and refiner with one VAE, as they are published."""
    home = tmp_path_factory.mktemp("xl")
    base, refiner = (save(open_source(f"arch:tiny-{name}"), home / name) for name in ("sdxl", "refiner"))
    shutil.rmtree(refiner / "vae")
    shutil.copytree(base / "vae", refiner / "vae")
    return base, refiner


def stock(folders: tuple[Path, Path], scheduler: str, steps: int, share: float, negative: str | None) -> Any:
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(folders[0], add_watermarker=False)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folders[1], add_watermarker=False)
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    asked = {"prompt": PROMPT, "negative_prompt": negative, "num_inference_steps": steps, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(3)
    half = base(**asked, denoising_end=share, output_type="latent", generator=generator).images
    return np.round(refiner(**asked, image=half, denoising_start=share, output_type="np").images[0] * 255)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "negative"),
    [
        ("euler", "EulerDiscreteScheduler", None),
        ("dpmpp-2m", "DPMSolverMultistepScheduler", NEGATIVE),
    ],
)
def test_the_picture_is_that_of_stocks_two_pipelines(
    folders: tuple[Path, Path], sampler: str, scheduler: str, negative: str | None
) -> None:
    models = [PipelineModel(open_source(str(folder))) for folder in folders]
    check_pair(models, sampler, encode=True)
    router = Router(models, (3, 2))
    request = Request(PROMPT, negative, guidance=5.0, seed=3, sampler=sampler)
    (ours,) = draw(router, begin(router, request))
    theirs = stock(folders, scheduler, 5, 0.6, negative)
    assert [share.calls for share in router.shares] == [3, 2]
    assert 10 * np.log10(255.0**2 / max(np.mean((ours.pixels - theirs) ** 2), 1e-9)) >= 60.0
    assert ours.trajectory is not None and ours.trajectory.positive is not None
    assert ours.trajectory.positive["time_ids"].tolist()[-1] == 6.0  # the score of a good picture
    assert ours.trajectory.negative is not None and ours.trajectory.negative["time_ids"].tolist()[-1] == 2.5


def test_a_refiner_that_cannot_read_is_refused_before_anything_is_drawn(folders: tuple[Path, Path]) -> None:
    models = [PipelineModel(open_source(str(folder))) for folder in folders]
    with pytest.raises(ConfigError, match="text width is"):
        check_pair(models)
    router = Router(models, (3, 2))
    batch = begin(router, Request(PROMPT))
    models[1].parts = models[1].parts - {"text_encoder_2"}
    with pytest.raises(UnsupportedError, match="has no text encoder"):
        draw(router, batch)
    assert router.shares[0].calls == 0
