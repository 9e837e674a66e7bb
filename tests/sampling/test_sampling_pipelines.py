"""`generate` against diffusers' own pipelines on the same weights: latents after every step, and the picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from sampling_pipelines import PipelineModel, make_pipe, tokenizer_folder

from diffship.sampling.generate import Request, generate

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
Make = Callable[..., Any]


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pipes(folder: Path) -> Make:
    made: dict[tuple[str, str], Any] = {}

    def get(kind: str, prediction: str = "epsilon") -> Any:
        if (kind, prediction) not in made:
            made[kind, prediction] = make_pipe(kind, folder, prediction)
        return made[kind, prediction]

    return get


def theirs(pipe: Any, sampler: str, images: int, seed: int, **asked: Any) -> tuple[list[Any], list[Any]]:
    name, changes = CLASSES[sampler]
    original, steps = pipe.scheduler, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.scheduler = getattr(diffusers, name).from_config(original.config, **changes)
        out = pipe(
            **asked,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(images)],
            num_images_per_prompt=images,
            output_type="np",
            callback_on_step_end=lambda _, step, time, state: steps.append(state["latents"].numpy().copy()) or {},
        )
    pipe.scheduler = original
    return steps, list(np.round(np.asarray(out.images) * 255).astype(np.uint8))


def compare(pipe: Any, folder: Path, sampler: str, images: int = 1, given: Any = None, **asked: Any) -> None:
    expected, pictures = theirs(pipe, sampler, images, 7, **asked)
    seen: list[Any] = []
    request = Request(
        asked["prompt"],
        negative=asked.get("negative_prompt"),
        steps=asked["num_inference_steps"],
        guidance=asked["guidance_scale"],
        size=(asked.get("width", 64), asked.get("height", 64)),
        seed=7,
        sampler=sampler,
        images=images,
        **(given or {}),
    )
    ours = generate(
        PipelineModel(pipe, folder),
        request,
        lambda now: seen.append(np.stack([t.latents for t in now])),
    )
    assert len(seen) == len(expected)
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(b).max()), f"step {step}"
    for picture, reference in zip(ours, pictures, strict=True):
        assert psnr(reference, picture.pixels) >= 60.0


ASKED = {"prompt": "a red apple!", "negative_prompt": "blurry", "num_inference_steps": 5, "guidance_scale": 6.0}


@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "lcm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion(pipes: Make, folder: Path, sampler: str, prediction: str) -> None:
    compare(pipes("sd", prediction), folder, sampler, **ASKED)


def test_several_images_without_guidance_or_square(pipes: Make, folder: Path) -> None:
    compare(pipes("sd"), folder, "euler-a", images=3, **ASKED)
    compare(pipes("sd"), folder, "euler", **{**ASKED, "guidance_scale": 1.0, "width": 96, "height": 64})


def test_lcm_with_and_without_time_condition(pipes: Make, folder: Path) -> None:
    compare(pipes("lcm"), folder, "lcm", images=2, **{**ASKED, "guidance_scale": 8.5})
    compare(pipes("sd"), folder, "lcm", **{**ASKED, "guidance_scale": 1.5})


@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_sdxl(pipes: Make, folder: Path, negative: str | None) -> None:
    sampler = "euler" if negative is None else "dpmpp-2m"
    compare(pipes("sdxl"), folder, sampler, **{**ASKED, "negative_prompt": negative, "width": 96, "height": 64})


@pytest.mark.parametrize("sampler", ["ddim", "euler-a"])
def test_inpainting(pipes: Make, folder: Path, sampler: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[13:50, 21:] = 255
    images = {"image": Image.fromarray(pixels), "mask_image": Image.fromarray(mask), "width": 64, "height": 64}
    given = {"image": pixels, "mask": mask}
    compare(pipes("inpaint"), folder, sampler, given=given, **ASKED, **images)
