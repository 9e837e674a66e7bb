"""The vae and swap-vae passes: published sizes, loss terms by hand, what is refused, scale factors, planted faults."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vae_cases import STUDENTS, TURNS, options_for, task_of

from diffship.compression.swap_vae import SwapVaePass, drawn_pictures, swap_vae
from diffship.compression.vae import VaePass
from diffship.core.errors import ConfigError, DiffshipError, SourceError
from diffship.core.job import Job
from diffship.core.problem import refuse
from diffship.core.recipe import read_recipe
from diffship.core.strict import load
from diffship.core.weights import MemoryWeights, SeededWeights, source_digest
from diffship.models.assemble import with_vae
from diffship.models.model import PipelineModel
from diffship.models.parts.autoencoder import Decoder, Encoder
from diffship.models.parts.component import weight_metas
from diffship.models.pipeline import Module, Pipeline
from diffship.models.saving import save
from diffship.models.sources.arch_configs import VAES, tiny_vae
from diffship.models.sources.opening import open_source, vae_of
from diffship.models.walks.cost import cost
from diffship.sampling.decode import decode, to_pixels
from diffship.training.adversarial import augmented, hinge
from diffship.training.loop import step_generator
from diffship.training.vae_report import Sides, compare
from diffship.training.vae_task import DECODER, DISCRIMINATOR, ENCODER, Turns, halves_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return open_source("arch:tiny-sd")


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    return open_source("emoji")


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_the_tiny_one_has_the_published_size_and_is_that_of_diffusers() -> None:
    """TAESD: 1,222,532 and 1,222,531; the guide has them from its code."""
    with torch.device("meta"):
        stock = diffusers.AutoencoderTiny()
        halves = [half("AutoencoderTiny", tiny_vae(64)) for half in (Encoder, Decoder)]
    assert [count(half) for half in halves] == [count(stock.encoder), count(stock.decoder)] == [1_222_532, 1_222_531]
    ours = {name: tuple(v.shape) for half in halves for name, v in half.inner.state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in stock.state_dict().items()}


@pytest.mark.slow
def test_the_small_one_has_the_published_size() -> None:
    """62.01 M of Hybrid SD, where the KL one has 83.65 M; no stock config says so."""
    config = {**VAES["sd15"], "diffship": {"decoder": [96, 192, 384, 384]}}
    with torch.device("meta"):
        encoder, decoder = (half("AutoencoderKL", config) for half in (Encoder, Decoder))
        stock = diffusers.AutoencoderKL.from_config({**VAES["sd15"], "block_out_channels": [96, 192, 384, 384]})
    assert (count(encoder), count(decoder)) == (34_163_664, 27_849_431)
    assert count(decoder) == count(stock.decoder) + count(stock.post_quant_conv)
    assert round((count(encoder) + count(decoder)) / 1e6, 2) == 62.01
    options = VaePass("x", student="small", steps=1)
    outline = options.outline(open_source("arch:sd15"))
    drawn = open_source("arch:sd15+small-vae")
    for made in (outline.pipeline, drawn):
        assert made.components[DECODER].config["diffship"] == {"decoder": [96, 192, 384, 384]}
    with pytest.raises(SourceError, match="name one of taesd and small-vae"):
        open_source("arch:sd15+small-vae+taesd")


@pytest.mark.slow
def test_decoders_cost_what_the_page_says(emoji: Pipeline) -> None:
    """Counted conv and linear GMAC; those of SD1.5 and TAESD at 512 px are the guide's, too."""
    recipe = read_recipe(ROOT / "recipes" / "emoji-tiny-vae.toml").passes[0][1].outline(emoji).pipeline
    sides = {"sd15": 64, "sd15+taesd": 64}
    costs = {name: cost(open_source(f"arch:{name}").components[DECODER], _square(side)) for name, side in sides.items()}
    costs |= {name: cost(one.components[DECODER], _square(16)) for name, one in (("emoji", emoji), ("tiny", recipe))}
    found = {name: f"{one.conv_linear_macs / 1e9:,.4g}" for name, one in costs.items()}
    assert found == {"sd15": "1,240", "sd15+taesd": "70.68", "emoji": "1.145", "tiny": "0.2815"}
    assert 3 * costs["tiny"].macs < costs["emoji"].macs  # a third is asked for
    page = (ROOT / "docs" / "compression.md").read_text(encoding="utf-8")
    assert "takes 1,240 GMAC at 512 px, TAESD's 71." in page and "0.28 GMAC where\n`emoji` has 1.14." in page


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


@pytest.mark.parametrize(
    ("vae", "said", "message"),
    [
        ("AutoencoderKL", {"decoder": [4, 8, 8]}, "legal are 4 multiples of 4"),
        ("AutoencoderKL", {"decoder": [4, 8, 8, 9]}, "legal are 4 multiples of 4"),
        ("AutoencoderKL", {"decoders": [4, 8, 8, 8]}, "did you mean 'decoder'"),
        ("AutoencoderKL", {"decoder": [4, 8, 8, 0]}, "legal is from 1"),
        ("AutoencoderTiny", {"decoder": [4, 8, 8, 8]}, "which AutoencoderTiny says by itself"),
    ],
)
def test_widths_that_make_no_decoder_are_refused(vae: str, said: dict[str, Any], message: str, tiny: Pipeline) -> None:
    config = {**(VAES["tiny-sd"] if vae == "AutoencoderKL" else tiny_vae(8)), "diffship": said}
    with pytest.raises(SourceError, match=message):
        with_vae(tiny, Module(vae, config, MemoryWeights({})))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), STUDENTS.items(), ids=STUDENTS)
def test_the_losses_of_every_turn_by_hand(name: str, more: dict[str, Any], tiny: Pipeline, tmp_path: Path) -> None:
    """The batch is the task's own; everything after it is computed here, with diffusers' whole auto-encoders."""
    options = options_for(
        tmp_path, **TURNS, **more, steps=20, filter_every=0, colour=0.5, w_pixel=2.0, w_adversarial=0.25
    )
    task = task_of(options, tiny, tmp_path)
    student = options.student_of(tiny)
    whole = getattr(diffusers, student.class_name).from_config(
        {k: v for k, v in student.config.items() if k != "diffship"}
        | ({"block_out_channels": [4, 8, 8, 12]} if name == "small" else {})
    )
    whole.decoder.load_state_dict(task.modules[DECODER].get_submodule("decoder").state_dict())
    if name == "small":
        whole.post_quant_conv.load_state_dict(task.modules[DECODER].get_submodule("post_quant_conv").state_dict())
    else:
        whole.encoder.load_state_dict(task.modules[ENCODER].get_submodule("encoder").state_dict())
    scale = 0.18215 if name == "small" else 1.0
    critic: Any = task.modules[DISCRIMINATOR]
    for step in range(6):
        learning = task.begin(step)
        total, figures = task.loss(2, step_generator(0, step))
        generator = step_generator(0, step)
        pixels, latents = task.batch(2, generator)
        wanted = {}
        if ENCODER in learning:
            wanted["latents"] = (whole.encode(pixels).latents - latents).abs().mean().item()
        drawn = whole.decode(latents * (1 - 0.25 * torch.rand((), generator=generator).item()) / scale).sample
        if DECODER in learning:
            error = 2 * (drawn - pixels).abs().mean()
            wanted["pixel"] = error.item()
            if step >= 2:
                fooled = -critic(augmented(drawn, generator)).mean()
                last = (whole.decoder.conv_out if name == "small" else whole.decoder.layers[-1]).weight
                pulls = [torch.autograd.grad(one, last, retain_graph=True)[0].norm().item() for one in (error, fooled)]
                wanted["adversarial"] = 0.25 * pulls[0] / (pulls[1] + 1e-4) * fooled.item()
        if DISCRIMINATOR in learning:
            sides = [critic(augmented(side, generator)) for side in (pixels, drawn)]
            wanted["discriminator"] = hinge(*sides).item()
        assert figures == pytest.approx(wanted, rel=1e-4), step
        assert total.item() == pytest.approx(sum(wanted.values()), rel=1e-4)


def test_latents_of_a_batch_are_those_of_diffusers(tiny: Pipeline, tmp_path: Path) -> None:
    """Sampled from the posterior and scaled, of recoloured pictures, too; mirrored ones from the cache."""
    task = task_of(options_for(tmp_path, flip=True, colour=0.5), tiny, tmp_path)
    teacher = diffusers.AutoencoderKL.from_config(tiny.components[ENCODER].config)
    teacher.encoder.load_state_dict(task.teacher.encoder.module.inner.encoder.state_dict())
    teacher.quant_conv.load_state_dict(task.teacher.encoder.module.inner.quant_conv.state_dict())
    pixels, latents = task.batch(8, step_generator(0, 3))
    samples = task.draws(8, step_generator(0, 3))
    with torch.no_grad():
        found = teacher.encode(pixels).latent_dist
    wanted = (found.mean + found.std * torch.stack([sample.posterior for sample in samples])) * 0.18215
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-5)
    assert {sample.mix is None for sample in samples} == {sample.flip for sample in samples} == {True, False}


@pytest.mark.parametrize("target", ["picture", "teacher"])
def test_the_filter_paints_what_is_learnt_white_and_encodes_it_anew(
    target: str, tiny: Pipeline, tmp_path: Path
) -> None:
    options = options_for(tmp_path, filter_every=1, shrink=0.0, colour=0.0, target=target, w_adversarial=0.0)
    task = task_of(options, tiny, tmp_path)
    task.begin(0)
    figures = task.loss(2, step_generator(0, 0))[1]
    pixels, latents = task.batch(2, step_generator(0, 0))
    with torch.no_grad():
        error = (task.decoder.decode(latents) - task.teacher.decoder.decode(latents)).abs().mean(1, keepdim=True)
        masked = torch.where(error < error.median(), torch.ones(()), pixels)
        latents = task.teacher.encoder.encode(masked)[0]
        wanted = masked if target == "picture" else task.teacher.decoder.decode(latents)
        assert figures["pixel"] == pytest.approx(F.l1_loss(task.decoder.decode(latents), wanted).item(), rel=1e-4)
    assert 0.4 < (masked == 1).float().mean() < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_pixel": 0.0, "perceptual": "none"}, "nothing to come near"),
        ({"decoder": (96, 192)}, "set student=small"),
        ({"disc_width": 10}, "multiples of 4"),
        ({"precision": "fp16"}, "unknown value 'fp16'"),
        ({"width": 0}, "legal is from 1"),
        ({"targets": "picture"}, "did you mean 'target'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(VaePass, {"data": "x", **options}, "pass vae")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("arch:tiny-sd+taesd", {}, "name an AutoencoderKL"),
        ("arch:tiny-sd", {"teacher": "arch:tiny-sd+taesd"}, "the teacher is an AutoencoderTiny"),
        ("arch:tiny-sd", {"student": "small", "decoder": (8, 8)}, "legal are 4 multiples of 4"),
        ("arch:tiny-sd", {"student": "arch:sd15"}, "whose encoder is not like the teacher's"),
        ("arch:tiny-sd", {"student": "no/such/thing"}, "no/such/thing"),
        ("arch:tiny-sd", {"perceptual": "nowhere"}, "perceptual=nowhere is no folder"),
        ("arch:tiny-sd", {"data": "nowhere"}, "nowhere is not a folder"),
        ("arch:tiny-sd", {"size": 100}, "the nearest are 64 and 128"),
    ],
)
def test_what_cannot_start_is_refused_before(
    source: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = replace(options_for(tmp_path), **{**options, **({"data": "nowhere"} if "data" in options else {})})
    with pytest.raises(DiffshipError, match=message):
        refuse(made.check(open_source(source)))


@pytest.mark.slow
def test_a_dry_run_counts_calls_and_tells_the_decoder(
    tiny: Pipeline, tmp_path: Path, command: Callable[..., Any]
) -> None:
    options = options_for(tmp_path, **TURNS, steps=12, filter_every=3, colour=0.5)
    outline = options.outline(tiny)
    turns = Turns(2, 1, 1)
    decoder, critic = turns.learnt(DECODER, 12), turns.learnt(DISCRIMINATOR, 12)
    calls = {(one.part.class_name, one.part.name): one.count for one in outline.calls}
    assert calls == {
        ("AutoencoderTiny", DECODER): pytest.approx(2 * (3 * decoder + critic + decoder / 3)),
        ("AutoencoderTiny", ENCODER): pytest.approx(2 * 3 * turns.learnt(ENCODER, 12)),
        ("AutoencoderKL", DECODER): pytest.approx(2 * decoder / 3),
        ("AutoencoderKL", ENCODER): pytest.approx(2 * (6 + decoder / 3)),
    }
    words = ["--pass", "vae", "--set", f"data={options.data}", "--set", "width=8", "--set", "steps=2"]
    found = command("compress", "arch:tiny-sd", *words, "--dry-run")
    (step,) = found["plan"]["passes"]
    assert (step["part"], step["hours"] > 0) == (DECODER, True)
    assert step["after"]["parameters"] == 19_763 and step["before"]["parameters"] == 44_911
    assert found["unet"]["parameters"] != 19_763


def kl_decoder(pipeline: Pipeline) -> Any:
    """Diffusers' own decode of latents as the U-Net has them."""
    vae = diffusers.AutoencoderKL.from_config(dict(pipeline.components[DECODER].config))
    halves = [pipeline.components[name].module().get_submodule("inner") for name in (ENCODER, DECODER)]
    vae.load_state_dict({name: value for half in halves for name, value in half.state_dict().items()})
    return lambda latents: vae.decode(latents / vae.config.scaling_factor).sample


@pytest.mark.slow
def test_a_swapped_vae_is_drawn_with_by_its_own_scale(tmp_path: Path) -> None:
    """Stock diffusers divides by the scaling factor of the VAE that is in the folder: 0.18215, or a tiny one's 1."""
    source = open_source("arch:tiny-sd")
    made, report = swap_vae(source, vae_of("arch:tiny-sd+taesd", source.family.kind))
    assert report is None and (source.family.scaling_factor, made.family.scaling_factor) == (0.18215, 1.0)
    folder = save(made, tmp_path / "model")
    stock = diffusers.AutoencoderTiny.from_pretrained(folder / "vae")
    assert stock.config.scaling_factor == 1.0
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = {
            "made": stock.decode(latents / stock.config.scaling_factor).sample,
            "source": kl_decoder(source)(latents),
        }
    for name, pipeline in (("made", made), ("source", source)):
        pixels = decode(PipelineModel(pipeline), latents[0].numpy()).astype(int)
        assert np.abs(pixels - to_pixels(wanted[name][0].numpy()).astype(int)).max() <= 1, name
    again = open_source(str(folder))
    assert again.family == made.family and again.model_index["vae"] == ["diffusers", "AutoencoderTiny"]


def new_vae(config: dict[str, Any]) -> Module:
    with torch.device("meta"):
        metas = {k: v for half in (Encoder, Decoder) for k, v in weight_metas(half("AutoencoderTiny", config)).items()}
    return Module("AutoencoderTiny", config, SeededWeights(metas, 0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_vae(8, latents=16), "16 latent channels, each latent 8 pixels wide; the denoiser draws 4"),
        (tiny_vae(8, levels=3), "each latent 4 pixels wide; the denoiser draws 4, each 8 pixels"),
        (tiny_vae(8), "does not fit the model's latents: .*other pictures: .*Set force=true"),
    ],
)
def test_latents_of_another_family_are_refused(config: dict[str, Any], message: str, emoji: Pipeline) -> None:
    with pytest.raises(ConfigError, match=message):
        swap_vae(emoji, new_vae(config))


@pytest.mark.slow
def test_a_vae_that_does_not_fit_is_forced_or_says_whose_latents_it_has(emoji: Pipeline, tmp_path: Path) -> None:
    vae = new_vae(tiny_vae(8))
    made, report = swap_vae(emoji, vae, force=True)
    assert report is not None and report.foreign and made.components[DECODER].class_name == "AutoencoderTiny"
    own = emoji.components[ENCODER].digest
    said = Module(vae.class_name, {**vae.config, "_diffship": {"latents": own}}, vae.weights)
    assert swap_vae(emoji, said)[1] is not None
    other = Module(vae.class_name, {**vae.config, "_diffship": {"latents": "of another"}}, vae.weights)
    with pytest.raises(ConfigError, match="does not fit"):
        swap_vae(emoji, other)
    place = str(save(with_vae(emoji, said), tmp_path / "model"))
    labels: list[str] = []
    step = SwapVaePass(place)
    assert step.check(emoji) == []
    back = step.run(emoji, Job(progress=lambda label, done, total: labels.append(label)))
    assert back.history[-1]["pass"] == "swap-vae" and len(back.history) == 1
    assert any("other pictures" in label for label in labels)
    assert source_digest(back.components[DECODER].weights) == made.components[DECODER].digest
    assert [problem.part for problem in SwapVaePass("arch:tiny-sd+lcm").check(open_source("arch:sd15"))] == []
    assert "has no VAE" in str(SwapVaePass(str(unet_alone(tmp_path))).check(emoji)[0])


def unet_alone(folder: Path) -> Path:
    place = save(open_source("arch:tiny-sd"), folder / "whole")
    return place / "unet"


Z = Callable[[torch.Tensor], torch.Tensor]
FAULTS: dict[str, tuple[Callable[[Z], Z], Callable[[Z], Z], str]] = {
    "nothing": (lambda d: d, lambda e: e, ""),
    "unscaled latents": (lambda d: lambda z: d(z * 0.18215), lambda e: e, r"wrong scale: the decoder.* times 5\.66"),
    "twice scaled": (lambda d: lambda z: d(z / 0.18215), lambda e: e, "wrong scale: the decoder"),
    "an encoder that forgets to scale": (lambda d: d, lambda e: lambda x: e(x) / 0.18215, r"latents are 5\.49 times"),
    "shifted colours": (lambda d: lambda z: d(z) + TINT, lambda e: e, r"shifted colours.*blue (0.9\d|1.00) x -0\.2"),
    "swapped colours": (lambda d: lambda z: d(z).flip(1), lambda e: e, "shifted colours"),
    "pale": (lambda d: lambda z: d(z) * 0.7, lambda e: e, r"shifted colours.*red 0\.7"),
    "saturates": (lambda d: lambda z: d(z) * 3, lambda e: e, "saturates: [3-9]"),
    "another family": (lambda d: lambda z: d(z[:, [2, 0, 3, 1]]), lambda e: e, "other pictures"),
    "a little noise": (lambda d: lambda z: d(z) + 0.03 * torch.cos(1e4 * d(z)), lambda e: e, ""),
}
TINT = torch.tensor([0.0, 0.0, -0.25])[:, None, None]


@pytest.fixture(scope="module")
def reference(emoji: Pipeline) -> Sides:
    encoder, decoder = halves_of(emoji, "cpu")
    return Sides(decoder.decode, encoder.encode)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_report_finds_planted_faults(name: str, reference: Sides) -> None:
    assert reference.encode is not None
    pictures = drawn_pictures(2, 64)
    spoil_decoder, spoil_encoder, message = FAULTS[name]
    ours = Sides(spoil_decoder(reference.decode), spoil_encoder(reference.encode))
    found = compare(reference, ours, pictures)
    told = "; ".join(found.found)
    assert re.search(message, told) if message else told == "", told
    if name == "nothing":
        assert (found.scale, found.unexplained, found.saturated) == (1, 0, 0) and found.slope == pytest.approx(1)
        assert found.psnr == found.reference_psnr
