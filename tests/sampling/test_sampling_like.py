"""Settings of pictures as requests: ours come back whole, A1111's text is read as its own reader reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffship.core.errors import ConfigError
from diffship.sampling.like import likeness, read_parameters
from diffship.sampling.picture import A1111_SAMPLERS, Picture, parameters, read_settings
from diffship.sampling.request import Request

# The example in the docstring of `parse_generation_parameters`, modules/infotext_utils.py of
# AUTOMATIC1111/stable-diffusion-webui, and what that function makes of it.
PUBLISHED = """girl with an artist's beret, determined, blue eyes, desert scene, computer monitors, heavy makeup, by \
Alphonse Mucha and Charlie Bowater, ((eyeshadow)), (coquettish), detailed, intricate
Negative prompt: ugly, fat, obese, chubby, (((deformed))), [blurry], bad anatomy, disfigured, poorly drawn face, \
mutation, mutated, (extra_limb), (ugly), (poorly drawn hands), messy drawing
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b"""


def test_a1111s_published_example() -> None:
    like = read_parameters(PUBLISHED)
    first, second, _ = PUBLISHED.split("\n")
    assert like.fields == {
        "prompt": first,
        "negative": second.removeprefix("Negative prompt: "),
        "steps": 20,
        "sampler": "euler-a",
        "guidance": 7.0,
        "seed": 965400086,
        "size": (512, 512),
        "prompt_syntax": "a1111",
    }
    assert like.unused == ("Model hash: 45dee52b",) and not like.ours
    Request(**like.fields)


SAMPLERS = {
    "Sampler: DPM++ 2M Karras": ("dpmpp-2m-karras", ()),
    "Sampler: DPM++ 2M, Schedule type: Karras": ("dpmpp-2m-karras", ()),
    "Sampler: DPM++ 2M, Schedule type: Automatic": ("dpmpp-2m-karras", ()),
    "Sampler: DPM++ 2M": ("dpmpp-2m", ()),
    "Sampler: Euler, Schedule type: Automatic": ("euler", ()),
    "Sampler: Euler, Schedule type: Exponential": ("euler", ("Schedule type: Exponential",)),
    "Sampler: DPM++ SDE, Schedule type: Karras": ("dpmpp-sde", ("Schedule type: Karras",)),
    "Sampler: DPM adaptive": (None, ("Sampler: DPM adaptive",)),
    "Sampler: PLMS": ("pndm", ()),
}


@pytest.mark.parametrize("text", SAMPLERS)
def test_samplers_by_their_names_there(text: str) -> None:
    like = read_parameters(f"a cat\nSteps: 20, {text}, Seed: 1, Size: 64x64")
    assert (like.fields.get("sampler"), like.unused) == SAMPLERS[text]


def test_odd_texts() -> None:
    like = read_parameters(
        "two\nlines <lora:moss:0.8>\nNegative prompt: bad\nworse\n"
        'Steps: 4, Seed: 2, Clip skip: 2, Lora hashes: "a: 1, b: 2"'
    )
    assert like.fields["prompt"] == "two\nlines " and like.fields["negative"] == "bad\nworse"
    assert like.fields["clip_skip"] == 1 and like.unused == ("Lora hashes: a: 1, b: 2", "<lora:moss:0.8>")
    assert read_parameters("just a prompt").fields == {"prompt": "just a prompt", "prompt_syntax": "a1111"}
    assert read_parameters("").fields["prompt"] == ""
    with pytest.raises(ConfigError, match="'many'"):
        read_parameters("a\nSteps: many, Seed: 1, Size: 1x1")


FULL: dict[str, Any] = {
    "prompt": "a (red:1.3) cat",
    "negative_prompt": "",
    "steps": 7,
    "sampler": "euler",
    "spacing": "trailing",
    "guidance": 4.5,
    "width": 128,
    "height": 64,
    "seed": 3,
    "rng": "philox",
    "image": 2,
    "negative_given": True,
    "prompt_syntax": "a1111",
    "clip_skip": 1,
    "model": "emoji",
    "model_digest": "ab" * 32,
}


def test_our_own_settings_come_back(tmp_path: Path) -> None:
    Picture(np.zeros((8, 8, 3), np.uint8), FULL).save(tmp_path / "a.png")
    like = likeness(read_settings(tmp_path / "a.png"))
    request = Request(**like.fields)
    assert (request.negative, request.size, request.first_image) == ("", (128, 64), 2)
    assert (request.steps, request.sampler, request.spacing, request.guidance) == (7, "euler", "trailing", 4.5)
    assert (request.seed, request.rng, request.prompt_syntax, request.clip_skip) == (3, "philox", "a1111", 1)
    assert like.ours and like.digest == "ab" * 32 and like.unused == ()
    without = {key: value for key, value in FULL.items() if key != "negative_given"}
    assert "negative" not in likeness(without).fields  # none was given
    assert likeness({**FULL, "decoded": "tiles"}).fields["memory"] == "low"
    split = [{"model": "a", "steps": 3}, {"model": "b", "steps": 4}]
    assert likeness({**FULL, "split": split}).split == (("a", 3), ("b", 4))
    controlled = likeness({**FULL, "mode": "inpainting", "controls": [{"name": "edges"}]})
    assert controlled.files == ("image", "mask", "control") and likeness(FULL).files == ()
    with pytest.raises(ConfigError, match="two passes"):
        likeness({**FULL, "hires": {"scale": 2.0, "strength": 0.5}})


def test_the_text_that_we_write_for_others_is_read_alike() -> None:
    own, theirs = likeness(FULL).fields, read_parameters(parameters(FULL)).fields
    for name in ("prompt", "steps", "sampler", "guidance", "seed", "size", "clip_skip", "prompt_syntax"):
        assert own[name] == theirs[name], name
    for name in A1111_SAMPLERS:
        assert read_parameters(parameters({**FULL, "sampler": name})).fields["sampler"] == name


BROKEN = {
    "no settings": {},
    "no size": {key: value for key, value in FULL.items() if key != "width"},
    "a split of nothing": {**FULL, "split": 3},
    "a split without names": {**FULL, "split": [{}]},
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_picture_of_ours_is_refused(case: str) -> None:
    with pytest.raises(ConfigError):
        likeness(BROKEN[case])


@pytest.mark.parametrize("wrong", [{"steps": 1e9}, {"seed": "x"}, {"prompt": 3}, {"width": [1]}, {"clip_skip": True}])
def test_hostile_values_are_refused_by_the_request(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Request(**likeness({**FULL, **wrong}).fields)


def told(stderr: str) -> str:
    return " ".join(stderr.split())


@pytest.mark.slow
def test_run_like_gives_the_same_bytes(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    asked = {
        "a": ["red apple", "--images", 2, "--seed", 5, "--negative", ""],
        "b": ["a (red:1.3) apple BREAK x", "--prompt-syntax", "a1111", "--rng", "philox", "--images", 2],
        "c": ["a cat", "--sampler", "euler-a", "--memory", "low", "--spacing", "trailing", "--guidance", 3],
    }
    for name, words in asked.items():
        drawn = command("run", tiny_bundle, *words, "--steps", 2, "--size", 64, "-o", tmp_path / name)
        assert drawn["exit_code"] == 0, drawn["stderr"]
        for number, picture in enumerate(drawn["pictures"]):
            again = command("run", tiny_bundle, "--like", picture["file"], "-o", tmp_path / f"{name}{number}.png")
            assert again["exit_code"] == 0, again["stderr"]
            assert (tmp_path / f"{name}{number}.png").read_bytes() == Path(picture["file"]).read_bytes()
    other = command("run", tiny_bundle, "a dog", "--like", tmp_path / "c0.png", "--seed", 9, "-o", tmp_path / "d")
    (picture,) = other["pictures"]
    assert (picture["prompt"], picture["seed"], picture["settings"]["sampler"]) == ("a dog", 9, "euler-a")
    assert Path(picture["file"]).name == "000-a-dog-9-tiny-like-c0.png"


@pytest.mark.slow
def test_run_like_the_picture_of_another_program(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", PUBLISHED.replace("512x512", "64x64").replace("Steps: 20", "Steps: 1"))
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=texts)
    made = command("run", tiny_bundle, "--like", tmp_path / "theirs.png", "-o", tmp_path / "o.png")
    assert made["exit_code"] == 0, made["stderr"]
    assert "not used of" in made["stderr"] and "Model hash: 45dee52b" in made["stderr"]
    assert "another program" in told(made["stderr"])
    assert made["pictures"][0]["settings"]["prompt_syntax"] == "a1111"
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    assert "no settings" in command("run", tiny_bundle, "--like", tmp_path / "bare.png")["error"]["message"]
    assert "no such file" in command("run", tiny_bundle, "--like", tmp_path / "gone.png")["error"]["message"]
    two = command("run", tiny_bundle, "a", "b", "c", "--negative", "x", "--negative", "y", "-o", tmp_path / "p")
    assert "2 negative prompts for 3 prompts" in two["error"]["message"]
    each = command(
        "run", tiny_bundle, "a", "b", "--negative", "x", "--negative", "y", "--steps", 1, "-o", tmp_path / "p"
    )
    assert [picture["settings"]["negative_prompt"] for picture in each["pictures"]] == ["x", "y"]
