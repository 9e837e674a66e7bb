"""ControlNets against diffusers' own pipelines of the same weights: latents after every call, and the picture."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffship.core.errors import ConfigError, HandoffError, SourceError, UnsupportedError
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.controlnet import with_controlnets
from diffship.models.sources.opening import open_source
from diffship.sampling.control import Control
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.wire import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore")
LEAST_DB = 60.0
NAMES = ("edges", "depth")
PIPES = {
    "tiny-sd": diffusers.StableDiffusionControlNetPipeline,
    "tiny-sdxl": diffusers.StableDiffusionXLControlNetPipeline,
}
PICTURES = [np.random.default_rng(seed).integers(0, 256, (64, 128, 3), np.uint8) for seed in (1, 2)]


def random_net(unet: Any, seed: int, channels: tuple[int, ...] = (4, 8, 8, 8)) -> Any:
    """A ControlNet whose last convolutions, zeros when training begins, say something."""
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    for name, parameter in net.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Pipeline]]:
    """(folder of a stock pipeline, with ControlNets beside it; the same with them as parts), by model."""
    home, found = tmp_path_factory.mktemp("control"), {}

    def get(arch: str) -> tuple[Path, Pipeline]:
        if arch not in found:
            pipeline = open_source(f"arch:{arch}")
            folder = save(pipeline, home / arch)
            unet = pipeline.components["unet"].module().get_submodule("inner")
            for seed, name in enumerate(NAMES):
                random_net(unet, seed).save_pretrained(folder / name)
            sources = {name: str(folder / name) for name in NAMES}
            found[arch] = folder, with_controlnets(open_source(str(folder)), sources)
        return found[arch]

    return get


def theirs(arch: str, folder: Path, count: int, **asked: Any) -> tuple[list[Any], Any]:
    nets = [diffusers.ControlNetModel.from_pretrained(folder / name) for name in NAMES[:count]]
    pipe = PIPES[arch].from_pretrained(folder, controlnet=nets if count > 1 else nets[0])
    pipe.set_progress_bar_config(disable=True)
    pipe.watermark = None
    pictures, steps = [Image.fromarray(pixels) for pixels in PICTURES[:count]], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pipe(
            "a red apple!", image=pictures if count > 1 else pictures[0], negative_prompt="blurry", guidance_scale=6.0,
            num_inference_steps=5, generator=torch.Generator().manual_seed(7), output_type="np",
            callback_on_step_end=lambda _, step, time, state: steps.append(state["latents"].numpy().copy()) or {},
            **asked,
        )  # fmt: skip
    return steps, np.round(out.images[0] * 255)


def asked(
    count: int, guess: bool = False, scale: Any = 1.0, start: float = 0.0, end: float = 1.0, **more: Any
) -> Request:
    scales = scale if isinstance(scale, list) else [scale] * count
    controls = tuple(
        Control(name, pixels, one, start, end)
        for name, pixels, one in zip(NAMES, PICTURES[:count], scales, strict=False)
    )
    return Request("a red apple!", "blurry", 5, 6.0, seed=7, controls=controls, guess=guess, **more)


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("tiny-sd", 1, {}),
    ("tiny-sd", 2, {"scale": [0.7, 1.3]}),
    ("tiny-sd", 1, {"guess": True, "scale": 0.8}),
    ("tiny-sd", 1, {"start": 0.2, "end": 0.7}),
    ("tiny-sdxl", 1, {"scale": 0.5}),
    ("tiny-sdxl", 2, {"guess": True, "start": 0.1}),
]


@pytest.mark.parametrize(
    ("arch", "count", "how"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_the_picture_is_stocks(made: Any, arch: str, count: int, how: dict[str, Any]) -> None:
    folder, pipeline = made(arch)
    named = {"guess": "guess_mode", "scale": "controlnet_conditioning_scale",
             "start": "control_guidance_start", "end": "control_guidance_end"}  # fmt: skip
    expected, picture = theirs(arch, folder, count, **{named[key]: value for key, value in how.items()})
    seen: list[Any] = []
    (ours,) = generate(PipelineModel(pipeline), asked(count, **how), lambda now: seen.append(now[0].latents[None]))
    for step, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(b).max()), f"step {step}"
    assert 10 * np.log10(255.0**2 / max(np.mean((ours.pixels - picture) ** 2), 1e-9)) >= LEAST_DB


@pytest.mark.slow
def test_control_travels_and_pictures_with_and_without_share_a_batch(made: Any) -> None:
    model = PipelineModel(made("tiny-sd")[1])
    request = asked(2, scale=[0.7, 1.3], start=0.2, guess=True)
    (begun,), denoiser = start(model, request), denoiser_of(model)
    (plain,) = start(model, Request("a blue car", "blurry", 5, 6.0, seed=8, size=request_size()))
    whole, other = (denoise([one], denoiser)[0].latents for one in (begun, plain))
    assert np.abs(whole - denoise(start(model, asked(2)), denoiser)[0].latents).max() > 1e-3
    half = [unpack(pack(one)) for one in denoise([begun, plain], denoiser, until=2)]
    assert [control.name for control in half[0].controls] == list(NAMES)
    for found, alone in zip(denoise(half, denoiser), (whole, other), strict=True):
        assert np.abs(found.latents - alone).max() <= 1e-5
    with pytest.raises(HandoffError, match="at most 32 characters"):
        unpack(pack(replace(begun, controls=(replace(begun.controls[0], name="x" * 40),))))
    with pytest.raises(HandoffError, match="picture of control edges is"):
        unpack(pack(replace(begun, controls=(replace(begun.controls[0], image=begun.controls[0].image[:, :32]),))))


def request_size() -> tuple[int, int]:
    height, width = PICTURES[0].shape[:2]
    return width, height


def test_what_cannot_be_controlled_is_refused(made: Any, tmp_path: Path) -> None:
    folder, pipeline = made("tiny-sd")
    model, pixels = PipelineModel(pipeline), PICTURES[0]
    with pytest.raises(ConfigError, match="no ControlNet 'pose'; it has depth, edges"):
        start(model, Request("x", controls=(Control("pose", pixels),)))
    with pytest.raises(ConfigError, match="named twice"):
        start(model, Request("x", controls=(Control("edges", pixels),) * 2))
    with pytest.raises(UnsupportedError, match="has no ControlNet; export it with --controlnet edges=SOURCE"):
        start(PipelineModel(open_source("arch:tiny-sd")), Request("x", controls=(Control("edges", pixels),)))
    with pytest.raises(ConfigError, match=r"starts at 0\.5 and ends at 0\.5"):
        Control("edges", pixels, start=0.5, end=0.5)
    with pytest.raises(ConfigError, match="guess is on"):
        Request("x", guess=True)
    (late,) = start(model, asked(1, start=0.91))
    assert "acts on no call" in late.facts["warnings"][0] and late.controls[0].weight(4) == 0.0
    for text, fault, message in (
        (str(tmp_path / "nothing"), SourceError, "no folder with a ControlNet"),
        (str(folder / "unet"), UnsupportedError, "class 'UNet2DConditionModel' is not supported"),
    ):
        with pytest.raises(fault, match=message):
            with_controlnets(open_source(str(folder)), {"edges": text})
    with pytest.raises(ConfigError, match="legal are a-z"):
        with_controlnets(open_source(str(folder)), {"My Edges": str(folder / "edges")})


@pytest.mark.slow
def test_a_controlnet_of_another_family_or_that_pools_is_refused(made: Any, tmp_path: Path) -> None:
    folder, _ = made("tiny-sd")
    with pytest.raises(SourceError, match="it was trained for another family"):
        with_controlnets(open_source("arch:tiny-sdxl"), {"edges": str(folder / "edges")})
    shutil.copytree(folder / "edges", tmp_path / "pools")
    config = json.loads((tmp_path / "pools" / "config.json").read_text())
    (tmp_path / "pools" / "config.json").write_text(json.dumps({**config, "global_pool_conditions": True}))
    with pytest.raises(UnsupportedError, match="global_pool_conditions"):
        with_controlnets(open_source(str(folder)), {"edges": str(tmp_path / "pools")})
    with pytest.raises(UnsupportedError, match="ControlNets control U-Nets"):
        with_controlnets(open_source("arch:tiny-sd3"), {"edges": str(folder / "edges")})


@pytest.mark.slow
def test_a_bundle_serves_plain_and_controlled_runs_from_one_copy_of_the_weights(
    made: Any, tmp_path: Path, graphs_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffship.cli.main import main
    from diffship.runtimes.engines.model import open_model

    folder, pipeline = made("tiny-sd")
    out, picture = tmp_path / "onnx", tmp_path / "edges.png"
    Image.fromarray(PICTURES[0]).save(picture)
    words = ["export", str(folder), "--controlnet", f"edges={folder / 'edges'}", "-o", str(out), "-q"]
    assert main([*words, "--cache", str(graphs_folder)]) == 0, capsys.readouterr().err
    data = [file.relative_to(out).as_posix() for file in out.rglob("*.onnx_data")]
    assert (out / "unet" / "model_controlled.onnx").is_file() and sorted(data)[0] == "controlnet_edges/model.onnx_data"
    assert len(data) == 5 and main(["verify", str(out), "-q"]) == 0  # text encoder, U-Net, VAE in two, ControlNet
    (expected,) = generate(PipelineModel(pipeline), asked(1, scale=0.6, end=0.8))
    words = ["run", str(out), "a red apple!", "--negative", "blurry", "--steps", "5", "--guidance", "6", "--seed", "7"]
    words += ["--control", "edges", str(picture), "--control-scale", "0.6", "--control-end", "0.8", "-q"]
    assert main([*words, "-o", str(tmp_path / "ours.png")]) == 0, capsys.readouterr().err
    ours = np.asarray(Image.open(tmp_path / "ours.png"))
    assert 10 * np.log10(255.0**2 / max(np.mean((ours.astype(float) - expected.pixels) ** 2), 1e-9)) >= LEAST_DB
    with open_model(out, "onnxruntime") as model:
        plain = Request("a red apple!", "blurry", 5, 6.0, seed=7, size=request_size())
        (alone,) = generate(model, plain)
        assert np.abs(alone.pixels.astype(int) - generate(PipelineModel(pipeline), plain)[0].pixels).max() <= 1
    assert main([*words, "--control-start", "0", "--control-start", "0.1", "-o", str(tmp_path / "no.png")]) == 2
    assert "given 2 times for 1 --control" in capsys.readouterr().err
