"""Image-to-image and inpainting against diffusers' own pipelines of the same weights, with every sampler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from sampling_pipelines import PipelineModel, make_pipe, tokenizer_folder
from sampling_toy import ToyModel

from diffship.core.errors import ConfigError, HandoffError, UnsupportedError
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.wire import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore")
LEAST_DB = 60.0
CLASSES: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
    "dpmpp-2s": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PIPES: Mapping[tuple[str, bool], Any] = {
    ("sd", False): diffusers.StableDiffusionImg2ImgPipeline,
    ("sd", True): diffusers.StableDiffusionInpaintPipeline,
    ("sdxl", False): diffusers.StableDiffusionXLImg2ImgPipeline,
    ("sdxl", True): diffusers.StableDiffusionXLInpaintPipeline,
}
QUICK = [("sd", "pndm", False), ("sd", "heun", True)]
ALL = [(kind, sampler, masked) for kind in ("sd", "sdxl") for sampler in CLASSES for masked in (False, True)]
REST = [case for case in ALL if case not in QUICK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(kind: str, masked: bool = False) -> Any:
        if kind not in made:
            made[kind] = make_pipe(kind, folder)
        if (kind, masked) not in made:
            safety = {} if kind == "sdxl" else {"requires_safety_checker": False}
            made[kind, masked] = PIPES[kind, masked](**made[kind].components, **safety)
            made[kind, masked].set_progress_bar_config(disable=True)
            made[kind, masked].watermark = None
        return made[kind, masked]

    return get


def image_and_mask(width: int = 64, height: int = 96) -> tuple[Any, Any]:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[13 : height - 14, 21:] = 255
    return pixels, mask


def theirs(pipe: Any, sampler: str, **asked: Any) -> tuple[list[Any], Any]:
    """(latents after every call, the picture) of stock diffusers."""
    steps: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.scheduler = getattr(diffusers, CLASSES[sampler]).from_config(pipe.scheduler.config)
        out = pipe(
            "a red apple!",
            negative_prompt="blurry",
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            callback_on_step_end=lambda _, step, time, state: steps.append(state["latents"].numpy().copy()) or {},
            **asked,
        )
    return steps, np.round(out.images[0] * 255).astype(np.uint8)


def compare(
    stock: Any, folder: Path, kind: str, sampler: str, masked: bool, size: Any = None, steps: int = 6, **asked: Any
) -> None:
    pixels, mask = image_and_mask(*((64, 96) if size is None else (80, 71)))
    given = {"image": Image.fromarray(pixels), **({"mask_image": Image.fromarray(mask)} if masked else {})}
    width, height = size or (64, 96)
    if masked:
        given |= {"width": width, "height": height}
    elif size is not None:
        given["image"] = given["image"].resize(size, Image.Resampling.LANCZOS)
    expected, picture = theirs(
        stock(kind, masked), sampler, num_inference_steps=steps, guidance_scale=6.0, **given, **asked
    )
    request = Request(
        "a red apple!", "blurry", steps=steps, guidance=6.0, seed=7, sampler=sampler, size=size, image=pixels,
        mask=mask if masked else None, **asked,
    )  # fmt: skip
    seen: list[Any] = []
    (ours,) = generate(
        PipelineModel(stock(kind), folder), request, lambda now: seen.append(np.stack([t.latents for t in now]))
    )
    assert len(seen) == len(expected)
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert np.abs(a - b).max() <= 2e-4 * max(1.0, np.abs(b).max()), f"step {step}: {np.abs(a - b).max()}"
    assert ours.pixels.shape == (height, width, 3)
    assert psnr(ours.pixels, picture) >= LEAST_DB


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


@pytest.mark.parametrize(
    ("kind", "sampler", "masked"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_every_sampler_draws_stocks_picture(stock: Any, folder: Path, kind: str, sampler: str, masked: bool) -> None:
    compare(stock, folder, kind, sampler, masked, strength=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_stocks_own_strength_all_of_it_and_another_size(stock: Any, folder: Path, kind: str, masked: bool) -> None:
    compare(stock, folder, kind, "euler", masked, steps=8)
    compare(stock, folder, kind, "pndm", masked, strength=1.0)
    compare(stock, folder, kind, "dpmpp-2m", masked, size=(96, 64), strength=0.5)


# ---- what is refused, said and carried on


def asked(**more: Any) -> Request:
    usual = {"steps": 4, "size": (64, 64), "image": np.full((64, 64, 3), 90, np.uint8)}
    return Request("x", seed=1, **{**usual, **more})


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("sd", {"image": None, "mask": np.zeros((64, 64), np.uint8)}, "a mask and no image"),
        ("sd", {"image": None, "strength": 0.5}, "no image to begin with"),
        (
            "sd",
            {"image": np.zeros((64, 64), np.uint8)},
            r"image is uint8 \(64, 64\); it must be uint8 \(height, width, 3",
        ),
        ("sd", {"image": np.zeros((64, 64, 3))}, "image is float64"),
        ("sd", {"image": "apple.png"}, "image is a str"),
        ("sd", {"mask": np.zeros((64, 64, 3), np.uint8)}, r"mask is uint8 \(64, 64, 3\)"),
        (
            "sd",
            {"size": None, "image": np.zeros((40, 64, 3), np.uint8)},
            r"image has 64x40 pixels: height is 0; .*a size",
        ),
        ("sd", {"strength": 0.2}, "strength 0.2 of 4 steps leaves no step"),
        (
            "sd",
            {"sampler": "pndm", "strength": 0.5, "scheduler": {"skip_prk_steps": False}},
            "pndm with skip_prk_steps",
        ),
    ],
)
def test_what_cannot_be_begun_is_refused_by_name(kind: str, more: dict[str, Any], message: str) -> None:
    model = ToyModel(kind, **more.pop("scheduler", {}))
    with pytest.raises(ConfigError, match=message):
        start(model, asked(**more))


def test_an_lcm_refuses_an_image_without_a_mask_and_the_model_its_missing_encoder() -> None:
    with pytest.raises(UnsupportedError, match=r"takes guidance as an input \(LCM\)"):
        start(ToyModel("lcm"), asked())
    model = ToyModel()
    model.parts = model.parts - {"vae_encoder"}
    with pytest.raises(UnsupportedError, match="has no vae_encoder"):
        start(model, asked())


def test_the_picture_has_the_size_of_the_image_unless_another_is_asked_for() -> None:
    """Toy models draw multiples of 64."""
    image = np.full((140, 200, 3), 90, np.uint8)
    (plain,) = generate(ToyModel(), asked(size=None, image=image))
    assert plain.pixels.shape == (128, 192, 3)
    assert plain.settings["warnings"] == [
        "the image has 200x140 pixels and is resized to 192x128; its proportions change"
    ]
    assert (plain.settings["mode"], plain.settings["strength"]) == ("image-to-image", 0.8)
    (other,) = generate(ToyModel(), asked(size=(128, 64), image=np.full((64, 128, 3), 90, np.uint8)))
    assert other.pixels.shape == (64, 128, 3) and "warnings" not in other.settings


def test_a_mask_that_covers_nothing_says_so_and_gives_the_image_back() -> None:
    (made,) = generate(ToyModel(), asked(mask=np.zeros((64, 64), np.uint8)))
    assert "covers nothing" in made.settings["warnings"][0]
    assert np.array_equal(made.trajectory.latents, made.trajectory.init_latents)


@pytest.mark.parametrize("sampler", ["pndm", "heun", "euler-a"])
def test_it_is_carried_on_by_another_device(sampler: str) -> None:
    """Image, its noise and the mask travel, and PNDM's first call: the second device draws the same."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 24:] = 255
    request, denoiser = asked(mask=mask, steps=6, strength=0.7, sampler=sampler), denoiser_of(ToyModel())
    (begun,) = start(ToyModel(), request)
    whole = denoise([begun], denoiser)[0].latents
    for stop in range(begun.step, begun.calls):
        half = unpack(pack(denoise([begun], denoiser, until=stop)[0]))
        assert np.array_equal(denoise([half], denoiser)[0].latents, whole), stop


def test_a_trajectory_with_half_of_a_mask_is_refused() -> None:
    (begun,) = start(ToyModel(), asked(mask=np.full((64, 64), 255, np.uint8)))
    for name in ("mask", "init_latents", "init_noise"):
        with pytest.raises(HandoffError, match="of a mask present"):
            unpack(pack(replace(begun, **{name: None})))
    with pytest.raises(HandoffError, match="init_noise is"):
        unpack(pack(replace(begun, init_noise=begun.init_noise[:, :4])))
    with pytest.raises(HandoffError, match="masked_latents"):
        begun.require_fit(ToyModel("inpaint").family)
