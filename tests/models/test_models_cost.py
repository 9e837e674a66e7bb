from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.models.walks.cost import cost


@cache
def pipeline(name: str) -> Pipeline:
    return open_source(f"arch:{name}")


def part(name: str, which: str) -> Component:
    return pipeline(name).components[which]


# guide 0.1: one call at the model's own size, 77 tokens; published counts of the hub's checkpoints
PUBLISHED = [
    ("sd15", 64, 859_520_964, 338.6, 63.0),
    ("sd21", 96, 865_910_724, 760.5, 314.1),
    ("sdxl", 128, 2_567_463_684, 2988.7, 392.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "params", "conv_linear", "attention"), PUBLISHED)
def test_published_unets(name: str, side: int, params: int, conv_linear: float, attention: float) -> None:
    found = cost(part(name, "unet"), {"height": side, "width": side})
    assert found.params == params
    assert found.conv_linear_macs / 1e9 == pytest.approx(conv_linear, rel=1e-3)
    assert found.attention_macs / 1e9 == pytest.approx(attention, rel=1e-3)
    assert found.bytes == 4 * params


@pytest.mark.slow
@pytest.mark.parametrize(("px", "kl", "attention", "tiny"), [(512, 1240, 17, 70.7), (1024, 4960, 275, 282.7)])
def test_published_decoders(px: int, kl: float, attention: float, tiny: float) -> None:
    sizes = {"height": px // 8, "width": px // 8}
    found = cost(part("sd15", "vae_decoder"), sizes)
    assert found.conv_linear_macs / 1e9 == pytest.approx(kl, rel=1e-3)
    assert found.attention_macs / 1e9 == pytest.approx(attention, rel=0.02)
    small = cost(part("sd15+taesd", "vae_decoder"), sizes)
    assert (small.conv_linear_macs / 1e9, small.attention_macs) == (pytest.approx(tiny, rel=1e-3), 0)


@pytest.mark.slow
def test_published_auto_encoder_parameters() -> None:
    # guide 5.4 counts encoder and decoder without the two 1x1 convolutions beside them
    assert cost(part("sd15", "vae_encoder")).params == 34_163_592 + 8 * 8 + 8
    assert cost(part("sd15", "vae_decoder")).params == 49_490_179 + 4 * 4 + 4
    assert cost(part("sd15+taesd", "vae_encoder")).params == 1_222_532
    assert cost(part("sd15+taesd", "vae_decoder")).params == 1_222_531


@pytest.mark.slow
def test_variants_differ_by_what_they_add() -> None:
    assert cost(part("sd15-inpaint", "unet")).params == 859_520_964 + 5 * 320 * 9
    assert cost(part("lcm-sd15", "unet")).params == 859_520_964 + 256 * 320
    assert cost(part("lcm-sdxl", "unet")).params == 2_567_463_684 + 256 * 320


@pytest.mark.slow
def test_published_text_encoders() -> None:
    assert cost(part("sdxl", "text_encoder_2")).params == 694_659_840
    assert cost(part("sd15", "text_encoder")).params == 123_060_480


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("tiny-sd", ""), ("tiny-sdxl", "text unet"), ("tiny-sd+taesd", "vae")])
def test_macs_equal_torchs_own_flop_counter(name: str, parts: str) -> None:
    prefixes = tuple(parts.split()) or ("",)
    for component in (c for c in pipeline(name).components.values() if c.name.startswith(prefixes)):
        sizes = {"batch_size": 2}
        feeds = [torch.from_numpy(value) for value in component.example(0, sizes).values()]
        # the CPU's fused attention is invisible to torch's counter
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            component.module()(*feeds)
        assert 2 * cost(component, sizes).macs == counter.get_total_flops(), component.name


@pytest.mark.slow
def test_image_size_stands_for_the_axes_of_the_auto_encoder() -> None:
    sizes = {"height": 16, "width": 8, "image_height": 128, "image_width": 64}
    own = {"sample_height": 128, "sample_width": 64}
    assert cost(part("tiny-sd", "vae_encoder"), sizes) == cost(part("tiny-sd", "vae_encoder"), own)
    own = {"latent_height": 16, "latent_width": 8}
    assert cost(part("tiny-sd", "vae_decoder"), sizes) == cost(part("tiny-sd", "vae_decoder"), own)
