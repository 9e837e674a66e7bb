"""`generate` over a Model of numpy maps: stages, cancellation, bad numbers, memory, inpainting, repeatability."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_toy import WIDTH, ToyModel, text

from diffship.core.errors import Cancelled, ConfigError, RunnerError, UnsupportedError
from diffship.core.registry import kind
from diffship.sampling.decode import decode_tiled
from diffship.sampling.generate import Request, draw, generate, generate_many, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.rng import torch_randn

ASKED: dict[str, Any] = {"prompt": "a red apple", "steps": 4, "seed": 11, "sampler": "euler-a"}


def test_same_seed_same_bits_and_image_i_is_seed_plus_i() -> None:
    first = generate(ToyModel(), Request(**ASKED, images=3))
    again = generate(ToyModel(), Request(**ASKED, images=3))
    second = generate(ToyModel(), Request(**{**ASKED, "seed": 12}))
    assert all(np.array_equal(a.trajectory.latents, b.trajectory.latents) for a, b in zip(first, again, strict=True))
    assert np.array_equal(first[1].trajectory.latents, second[0].trajectory.latents)
    assert [picture.settings["seed"] for picture in first] == [11, 12, 13]
    assert first[0].pixels.shape == (64, 64, 3)
    assert first[0].pixels.dtype == np.uint8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, in diffusers' scheduler
def test_the_spacing_that_is_asked_for_replaces_the_schedulers() -> None:
    """Timesteps as diffusers' scheduler has them under that spacing; LCM's are its own."""
    import diffusers

    asked = {**ASKED, "sampler": "euler"}
    for spacing in ("linspace", "leading", "trailing"):
        picture = generate(ToyModel(), Request(**asked, spacing=spacing))[0]
        sampler = picture.trajectory.sampler
        theirs = diffusers.EulerDiscreteScheduler.from_config(sampler.to_config())
        theirs.set_timesteps(4)
        assert theirs.config.timestep_spacing == spacing == picture.settings["spacing"]
        np.testing.assert_allclose(sampler.timesteps(4), theirs.timesteps.numpy(), rtol=1e-6)
    with pytest.raises(ConfigError, match="did you mean 'trailing'"):
        Request("x", spacing="trailling")
    with pytest.raises(ConfigError, match="spacing has no say"):
        generate(ToyModel(), Request(**{**ASKED, "sampler": "lcm"}, spacing="trailing"))


@pytest.mark.slow
def test_two_processes_agree_bit_for_bit() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from sampling_toy import ToyModel\n"
        "from diffship.sampling.generate import Request, generate\n"
        "from diffship.sampling.wire import pack\n"
        "import hashlib\n"
        "picture = generate(ToyModel(), Request('a red apple', steps=4, seed=11, sampler='euler-a'))[0]\n"
        "print(hashlib.sha256(pack(picture.trajectory) + picture.pixels.tobytes()).hexdigest())\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    root = Path(__file__).parents[2]
    runs = {
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=root).stdout for _ in "ab"
    }
    assert len(runs) == 1


def test_chunks_and_batches_equal_singles() -> None:
    whole = generate(ToyModel(), Request(**ASKED, images=4))
    for changes in ({"batch": 1}, {"batch": 3}, {"memory": "low"}):
        parts = generate(ToyModel(), Request(**ASKED, images=4, **changes))
        for a, b in zip(whole, parts, strict=True):
            assert np.array_equal(a.trajectory.latents, b.trajectory.latents)


def test_many_requests_share_calls_and_keep_their_order() -> None:
    model = ToyModel()
    requests = [Request(**{**ASKED, "seed": 1}), Request("x", size=(128, 64), steps=6), Request("y", sampler="pndm")]
    together = generate_many(model, requests)
    assert len(model.use("unet").calls) == 5 + 6  # pndm's 4 + 1 beside euler-a's 4, then the other size alone
    for request, picture in zip(requests, together, strict=True):
        assert np.array_equal(picture.pixels, generate(ToyModel(), request)[0].pixels)


def test_a_picture_of_tiles_says_so_and_one_of_one_tile_does_not() -> None:
    """Decoding in tiles is close to decoding at once and not equal: whoever draws it again must know."""
    for side, tiled in ((256, False), (320, True)):
        (picture,) = generate(ToyModel(), Request(**{**ASKED, "size": (64, side)}, memory="low"))
        told = [text for text in picture.settings.get("warnings", ()) if "tiles of 32 latent pixels" in text]
        assert bool(told) == tiled == ("decoded" in picture.settings)
        (whole,) = generate(ToyModel(), Request(**{**ASKED, "size": (64, side)}))
        assert "decoded" not in whole.settings


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("sd", {"strength": 0.5}, "strength is 0.5, and there is no image to begin with"),
        ("inpaint", {"strength": 0.1, "steps": 4}, "strength 0.1 of 4 steps leaves no step to draw"),
        ("inpaint", {"strength": 1.5}, "strength"),
    ],
)
def test_a_strength_that_cannot_be_is_refused(kind: str, asked: dict[str, Any], message: str) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    given = {"image": pixels, "mask": pixels[..., 0]} if kind == "inpaint" else {}
    with pytest.raises(ConfigError, match=message):
        generate(ToyModel(kind), Request("x", size=(64, 64), **asked, **given))


def test_low_memory_releases_each_part_when_its_work_is_done() -> None:
    model = ToyModel()
    generate(model, Request(**ASKED, memory="low"))
    assert model.released == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]
    model = ToyModel()
    generate(model, Request(**ASKED))
    assert model.released == []


def test_given_latents_replace_the_noise() -> None:
    noise = np.stack([torch_randn(11, (4, 8, 8))])
    asked = {**ASKED, "sampler": "euler"}
    ours = generate(ToyModel(), Request(**asked, latents=noise))[0]
    assert np.array_equal(ours.trajectory.latents, generate(ToyModel(), Request(**asked))[0].trajectory.latents)
    for bad in (noise[0], np.zeros((1, 4, 8, 16), np.float32), np.full((1, 4, 8, 8), np.nan, np.float32)):
        with pytest.raises(ConfigError, match="latents"):
            generate(ToyModel(), Request(**asked, latents=bad))


def test_guidance_one_takes_one_row_and_no_negative() -> None:
    model = ToyModel()
    generate(model, Request(**ASKED, guidance=1.0))
    assert model.use("unet").calls[0]["sample"] == (1, 4, 8, 8)
    assert len(model.use("text_encoder").calls) == 1


def test_time_condition_takes_guidance_instead_of_rows() -> None:
    model = ToyModel("lcm")
    weak, strong = (generate(model, Request("x", steps=2, sampler="lcm", guidance=g))[0] for g in (2.0, 9.0))
    assert model.use("unet").calls[0]["timestep_cond"] == (1, 256)
    assert not np.array_equal(weak.trajectory.latents, strong.trajectory.latents)


LCM = {"_class_name": "LCMScheduler"}


@pytest.mark.parametrize(
    ("kind", "scheduler", "asked", "told"),
    [
        ("sd", {}, {"negative": "pear", "guidance": 7.5}, None),
        ("sd", {}, {"negative": "pear", "guidance": 1.0}, "negative prompt is not used: guidance is 1"),
        ("sd", {}, {"negative": "", "guidance": 1.0}, None),
        ("sd", {}, {"guidance": 7.5, "sampler": "lcm"}, None),  # of a model that was not made for few steps
        ("sd", LCM, {"guidance": 2.0, "negative": "pear"}, None),
        ("sd", LCM, {"guidance": 2.5}, "guidance is 2.5: this model has its guidance in its weights"),
        ("sd", LCM, {"guidance": 2.5, "sampler": "euler-a"}, "from 1 to 2 is good"),
        ("lcm", LCM, {"guidance": 9.0}, None),
        ("lcm", LCM, {"guidance": 9.0, "negative": "pear"}, "negative prompt is not used: this model takes guidance"),
    ],
)
def test_what_nothing_reads_and_guidance_that_is_too_strong_are_told(
    kind: str, scheduler: dict[str, Any], asked: dict[str, Any], told: str | None
) -> None:
    picture = generate(ToyModel(kind, **scheduler), Request("x", steps=2, **asked))[0]
    warnings = picture.settings.get("warnings", [])
    assert len(warnings) == (told is not None), warnings
    assert told is None or told in warnings[0]


def test_guidance_up_to_two_draws_away_from_the_negative_prompt_in_a_few_steps() -> None:
    model = ToyModel("sd", **LCM)
    drawn = [generate(model, Request("x", steps=4, guidance=2.0, negative=text))[0] for text in ("pear", "plum")]
    assert drawn[0].settings["sampler"] == "lcm"
    assert not np.array_equal(drawn[0].trajectory.latents, drawn[1].trajectory.latents)
    assert model.use("unet").calls[0]["sample"][0] == 2


def test_sdxl_conditioning() -> None:
    model = ToyModel("sdxl")
    picture = generate(model, Request("a red apple", size=(128, 64)))[0]
    condition, away = picture.trajectory.positive, picture.trajectory.negative
    states = text({"input_ids": model.tokenizers["tokenizer"](["a red apple"]).ids})["last_hidden_state"][0]
    assert np.allclose(condition["encoder_hidden_states"], np.concatenate([states * 2, states * 2], -1))
    assert np.allclose(condition["text_embeds"], states[0] * 2)
    assert condition["time_ids"].tolist() == [64, 128, 0, 0, 64, 128]
    assert not away["encoder_hidden_states"].any() and not away["text_embeds"].any()
    spoken = generate(model, Request("a red apple", negative="", size=(128, 64)))[0]
    assert spoken.trajectory.negative["encoder_hidden_states"].any()
    assert model.use("unet").calls[0]["encoder_hidden_states"] == (2, 77, 2 * WIDTH)


def test_refiner_conditioning_ends_with_a_score() -> None:
    refiner = kind("sdxl-refiner")
    assert refiner.size_conditions((128, 64))["time_ids"].tolist() == [64, 128, 0, 0, 6.0]
    assert refiner.size_conditions((128, 64), negative=True)["time_ids"].tolist() == [64, 128, 0, 0, 2.5]
    assert kind("sd").size_conditions((64, 64)) == {}


def test_cancel_and_progress() -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(Cancelled):
        generate(
            ToyModel(), Request(**ASKED), lambda now: seen.append((now[0].step, now[0].calls)), lambda: len(seen) > 1
        )
    assert seen == [(1, 4), (2, 4)]


@pytest.mark.parametrize(("part", "output"), [("text_encoder", "last_hidden_state"), ("vae_decoder", "sample")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_numbers_name_the_part(part: str, output: str, value: float) -> None:
    model = ToyModel()
    good = model.runners[part].function

    def bad(feeds: Any) -> Any:
        outputs = {name: array.copy() for name, array in good(feeds).items()}
        outputs[output][0, 0, 0] = value
        return outputs

    model.runners[part].function = bad
    with pytest.raises(RunnerError, match=part):
        generate(model, Request(**ASKED))


def test_a_bad_step_names_the_unet_and_the_call() -> None:
    model = ToyModel()
    good = model.runners["unet"].function

    def bad(feeds: Any) -> Any:
        broken = len(model.runners["unet"].calls) == 3
        return {"out_sample": good(feeds)["out_sample"] * (np.float32("nan") if broken else 1)}

    model.runners["unet"].function = bad
    with pytest.raises(RunnerError, match="unet: the output of call 3 of 4"):
        generate(model, Request(**ASKED))


def test_a_black_picture_is_refused() -> None:
    model = ToyModel()
    model.runners["vae_decoder"].function = lambda feeds: {"sample": -np.ones((1, 3, 64, 64), np.float32)}
    with pytest.raises(RunnerError, match="vae_decoder: the picture is black"):
        generate(model, Request(**ASKED))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 151}, "steps"),
        ({"steps": float("nan")}, "steps"),
        ({"steps": True}, "steps"),
        ({"guidance": -0.1}, "guidance"),
        ({"guidance": 35.1}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("1e309")}, "guidance"),
        ({"guidance": "7"}, "guidance"),
        ({"images": 0}, "images"),
        ({"images": 5}, "images"),
        ({"images": 10**30}, "images"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**63 - 1, "images": 2}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"size": (7, 64)}, "width"),
        ({"size": (64, 1537)}, "height"),
        ({"size": (100, 64)}, "64 and 128"),
        ({"size": 512}, "size"),
        ({"size": (True, 64)}, "width"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"negative": "x" * 2001}, "negative"),
        ({"rng": "mt"}, "rng"),
        ({"memory": "lowest"}, "memory"),
        ({"sampler": "huen"}, "sampler"),
        ({"batch": 0}, "batch"),
    ],
)
def test_bounds_are_checked_before_work(changes: dict[str, Any], word: str) -> None:
    model = ToyModel()
    with pytest.raises(ConfigError, match=word):
        generate(model, Request(**{**ASKED, **changes}))
    assert not model.use("text_encoder").calls


@pytest.mark.parametrize(
    "changes",
    [{"steps": 1}, {"guidance": 0.0}, {"guidance": 35}, {"images": 4}, {"seed": 2**63 - 1}, {"prompt": ""}],
)
def test_bounds_themselves_are_legal(changes: dict[str, Any]) -> None:
    assert generate(ToyModel(), Request(**{**ASKED, **changes}))


def test_missing_parts_are_named() -> None:
    model = ToyModel()
    model.parts = frozenset({"unet", "vae_decoder"})
    with pytest.raises(UnsupportedError, match="text encoder"):
        generate(model, Request("x"))
    model.parts = frozenset({"unet", "text_encoder"})
    with pytest.raises(UnsupportedError, match="vae_decoder"):
        generate(model, Request("x"))


def test_inpainting_feeds_nine_channels() -> None:
    model = ToyModel("inpaint")
    image, mask = np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    end = generate(model, Request(**ASKED, image=image, mask=mask))[0].trajectory
    assert model.use("unet").calls[0]["sample"] == (2, 9, 8, 8)
    assert end.mask[0, 0].tolist() == [0] * 4 + [1] * 4
    assert abs(float(end.masked_latents[:, :, :4].mean()) / 0.18215 - (200 / 127.5 - 1)) < 0.1
    assert abs(float(end.masked_latents[:, :, 4:].mean())) < 0.05
    with pytest.raises(ConfigError, match="mask"):
        generate(model, Request(**ASKED))
    with pytest.raises(ConfigError, match="both an image and a mask"):
        generate(model, Request(**ASKED, image=image))


def convolve(latents: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A decoder that looks one latent pixel far, with zero borders, and doubles the size."""
    padded = np.pad(latents, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = latents.shape[-2:]
    near = sum(padded[..., i : i + height, j : j + width] * (1 + i - 2 * j) for i in range(3) for j in range(3))
    return np.asarray(np.tanh(near).repeat(2, -2).repeat(2, -1), np.float32)


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (33, 40), (64, 96), (24, 129)])
def test_tiles_equal_the_whole(shape: tuple[int, int]) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 3, *shape), np.float32)
    sizes: list[tuple[int, ...]] = []

    def run(tile: Any) -> Any:
        sizes.append(tile.shape[-2:])
        return convolve(tile)

    tiled = decode_tiled(run, latents, 2)
    assert np.abs(tiled - convolve(latents)).max() <= 2e-6
    assert max(max(size) for size in sizes) <= 32
    assert len(set(sizes)) == 1


@pytest.mark.slow
def test_the_room_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from sampling_toy import toy_for\n"
        "from diffship.sampling.generate import Request, generate\n"
        "from diffship.sampling.samplers import SAMPLERS\n"
        "from diffship.sampling.wire import pack, unpack\n"
        "for name in SAMPLERS:\n"
        "    picture = generate(toy_for(name), Request('x', sampler=name, steps=4))[0]\n"
        "    unpack(pack(picture.trajectory))\n"
        "print('drawn')\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout == "drawn\n", done.stderr


def test_half_a_character_is_replaced_where_it_is_drawn_and_where_it_is_told() -> None:
    (picture,) = generate(ToyModel(), Request("a\ud800b", negative="\udfff", steps=1))
    assert (picture.settings["prompt"], picture.settings["negative_prompt"]) == ("a?b", "?")
    assert picture.png().startswith(b"\x89PNG")


def test_a_decomposed_prompt_is_the_composed_one() -> None:
    typed = Request("cafe\N{COMBINING ACUTE ACCENT}", negative="e\N{COMBINING ACUTE ACCENT}")
    assert (typed.prompt, typed.negative) == ("caf\xe9", "\xe9")
    assert start(ToyModel(), typed)[0].prompt == typed.prompt


def test_trajectories_that_are_done_open_no_unet() -> None:
    model = ToyModel()
    done = denoise(start(model, Request(**ASKED)), denoiser_of(model))
    whole = generate(ToyModel(), Request(**ASKED))

    class Decoder(ToyModel):
        def use(self, part: str) -> Any:
            assert part == "vae_decoder", part
            return super().use(part)

    (picture,) = draw(Decoder(), done)
    assert np.array_equal(picture.pixels, whole[0].pixels)


def test_many_requests_keep_their_own_batch_and_memory() -> None:
    model = ToyModel()
    requests = [
        Request(**{**ASKED, "images": 2, "batch": 1}),
        Request(**{**ASKED, "seed": 5, "images": 3}),
        Request(**{**ASKED, "seed": 7, "memory": "low"}),
        Request(**{**ASKED, "seed": 9}),
    ]
    pictures = generate_many(model, requests)
    assert [picture.settings["seed"] for picture in pictures] == [11, 12, 5, 6, 7, 7, 9]
    rows = {call["sample"][0] for call in model.runners["unet"].calls}
    # two rows an image: one alone (batch 1, and low memory), and the four images of the others together
    assert rows == {2, 8}
    alone = [picture for request in requests for picture in generate(ToyModel(), request)]
    for ours, theirs in zip(pictures, alone, strict=True):
        assert np.array_equal(ours.trajectory.latents, theirs.trajectory.latents)
    calm = ToyModel()
    generate_many(calm, [requests[1], requests[3]])
    assert calm.released == []
