"""`run` with an image, a mask and a second pass: the files and words that people give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffship.runtimes.engines.model import open_model
from diffship.sampling.generate import Request, generate
from diffship.sampling.picture import read_pixels, read_settings

WORDS = ("--steps", 3, "--seed", 1, "--sampler", "ddim")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (70, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    return tmp_path / "given.png"


@pytest.mark.slow
def test_an_image_a_mask_and_a_second_pass_are_what_the_api_draws(
    command: Any, tiny_bundle: Path, image: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    words = ["run", tiny_bundle, "red apple", *WORDS, "--image", image]
    masked = command(*words, "--mask", tmp_path / "mask.png", "-o", tmp_path / "masked.png")
    large = command(*words, "--strength", 0.7, "--hires", 2, "--hires-strength", 0.4, "-o", tmp_path / "large.png")
    assert masked["exit_code"] == large["exit_code"] == 0, masked["stderr"] + large["stderr"]
    assert any("the image has 64x70 pixels and is resized to 64x64" in text for text in masked["warnings"])
    assert "warning: the image has 64x70" in masked["stderr"]
    settings = read_settings(tmp_path / "large.png")
    assert settings["hires"] == {"scale": 2.0, "strength": 0.4} and settings["mode"] == "image-to-image"
    pixels, mask = read_pixels(image), np.eye(64, dtype=np.uint8) * 255
    asked = {"prompt": "red apple", "steps": 3, "seed": 1, "sampler": "ddim"}
    with open_model(tiny_bundle, "onnxruntime") as model:
        (one,) = generate(model, Request(**asked, image=pixels, mask=mask))
        (first,) = generate(model, Request(**asked, image=pixels, strength=0.7))
        (second,) = generate(model, Request(**asked, image=first.pixels, size=(128, 128), strength=0.4))
    assert np.array_equal(read_pixels(tmp_path / "masked.png"), one.pixels)
    assert np.array_equal(read_pixels(tmp_path / "large.png"), second.pixels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "IMAGE", "--mask", "gone.png"], "gone.png: cannot be read"),
        (["--mask", "IMAGE"], "a mask and no image"),
        (["--strength", "0.5"], "no image to begin with"),
        (["--image", "IMAGE", "--strength", "0.1"], "leaves no step to draw"),
        (["--hires", "5"], "--hires is 5.0; legal is a number from 1.0 to 4.0"),
        (["--hires-strength", "0.5"], "give --hires SCALE too"),
        (["--image", "IMAGE", "--mask", "IMAGE", "--hires", "2"], "leave one of them out"),
        (["--control", "edges", "IMAGE"], "has no ControlNet; export it with --controlnet edges=SOURCE"),
        (["--control", "edges", "gone.png"], "gone.png: cannot be read"),
        (["--control-scale", "0.5"], "--control-scale is given 1 times for 0 --control"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: Any, tiny_bundle: Path, image: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    given = [image if word == "IMAGE" else word for word in words]
    document = command("run", tiny_bundle, "x", *WORDS, *given, "-o", tmp_path / "o.png")
    assert document["exit_code"] in (2, 3) and message in document["error"]["message"]
    assert not (tmp_path / "o.png").exists()
