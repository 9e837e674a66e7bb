from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from diffship.core.errors import ConfigError, RunnerError
from diffship.core.weights import SeededWeights
from diffship.models.parts.component import Component, weight_metas
from diffship.models.parts.unet import unet
from diffship.models.sources.opening import open_source
from diffship.models.walks.blocks import block_of, blocks, layers
from diffship.models.walks.stages import Arrays, Stage, cut, memory_stages, stages_forward

NAMES = ("tiny-sd", "tiny-sdxl", "tiny-lcm", "tiny-sdxl no mid")


@cache
def part(name: str, which: str = "unet") -> Component:
    name, _, reduced = name.partition(" ")
    component = open_source(f"arch:{name}").components[which]
    return without_mid(component) if reduced else component


def without_mid(component: Component) -> Component:
    config = {**component.config, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 2]}
    empty = unet(config, component.weights)
    return unet(config, SeededWeights(weight_metas(empty.meta), 3))


@cache
def whole(name: str, which: str = "unet") -> tuple[Arrays, Arrays]:
    feeds = part(name, which).example(1, {"batch_size": 2})
    return feeds, part(name, which).load().run(feeds)


def chain(stages: list[Stage], feeds: Arrays) -> Arrays:
    values = dict(feeds)
    for stage in stages:
        values.update(stage.load().run({spec.name: values[spec.name] for spec in stage.inputs}))
    return values


def worst(found: Arrays, expected: Arrays) -> float:
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stages_in_sequence_equal_the_whole(name: str) -> None:
    feeds, expected = whole(name)
    inside = [block for block in blocks(part(name))[:-1] if block.startswith(("down", "mid", "up"))]
    assert worst(chain(cut(part(name), inside[::6]), feeds), expected) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_after_every_layer_equals_the_whole(name: str) -> None:
    feeds, expected = whole(name)
    stages = cut(part(name), layers(part(name)))
    assert [stage.layers for stage in stages] == [(layer,) for layer in layers(part(name))]
    assert worst(chain(stages, feeds), expected) <= 1e-6


@pytest.mark.parametrize("which", ["text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"])
def test_every_part_can_be_cut(which: str) -> None:
    feeds, expected = whole("tiny-sdxl", which)
    stages = cut(part("tiny-sdxl", which), blocks(part("tiny-sdxl", which))[:-1])
    assert len(stages) == len(blocks(part("tiny-sdxl", which)))
    assert worst(chain(stages, feeds), expected) <= 1e-5


@pytest.mark.slow
def test_published_cuts_of_sd15_carry_the_skips_that_cross() -> None:
    first, second, third = cut(part("tiny-sd"), ["down_blocks.3", "up_blocks.2.resnets.2"])
    assert first.layers[-1] == "down_blocks.3.resnets.1" and second.layers[0] == "mid_block.resnets.0"
    assert third.layers[0] == "up_blocks.2.attentions.2.proj_in"
    names = [spec.name for spec in third.inputs]
    assert "up_blocks.2.resnets.2.out" in names
    skips = ["conv_in.out", "down_blocks.0.attentions.0.out", "down_blocks.0.attentions.1.out"]
    assert [name for name in names if name.startswith(("conv_in", "down"))] == skips[::-1]
    assert "down_blocks.3.resnets.1.out" in [spec.name for spec in second.inputs]
    assert [spec.name for spec in third.outputs] == ["out_sample"]
    shapes = {spec.name: spec.shape for spec in first.outputs}
    assert shapes["down_blocks.2.downsamplers.0.out"] == ("batch_size", 32, "height / 8", "width / 8")


@pytest.mark.slow
def test_boundaries_match_their_specs_at_another_size() -> None:
    component = part("tiny-sdxl")
    sizes = {"batch_size": 2, "height": 8, "width": 12, "sequence_length": 5}
    values: Arrays = component.example(0, sizes)
    for stage in cut(component, ["mid_block.attentions.0.transformer_blocks.0", "up_blocks.0.attentions.1"]):
        outputs = stage.load().run({spec.name: values[spec.name] for spec in stage.inputs})
        for spec in stage.outputs:
            assert outputs[spec.name].shape == spec.resolve(sizes)
        values.update(outputs)


@pytest.mark.slow
def test_recomputed_time_embedding_lets_stages_stand_at_their_own_timestep() -> None:
    component = part("tiny-lcm")
    feeds, expected = whole("tiny-lcm")
    stages = cut(component, ["down_blocks.2", "up_blocks.1"], embed="recompute")
    for stage in stages:
        names = [spec.name for spec in stage.inputs]
        assert "timestep" in names and "timestep_cond" in names and "time_embedding.out" not in names
    assert worst(chain(stages, feeds), expected) <= 1e-6


@pytest.mark.slow
def test_a_stage_can_be_cut_again() -> None:
    feeds, expected = whole("tiny-lcm")
    first, second = cut(part("tiny-lcm"), ["mid_block"], embed="recompute")
    again = cut(first, ["down_blocks.1"], embed="recompute")
    assert sum((stage.layers for stage in again), ())[-1] == first.layers[-1]
    assert [stage.name for stage in again] == ["unet.0.0", "unet.0.1"]
    assert worst(chain([*again, second], feeds), expected) <= 1e-6


@pytest.mark.slow
def test_stages_own_disjoint_weights_that_make_up_the_whole() -> None:
    stages = cut(part("tiny-sdxl"), ["down_blocks.1", "mid_block"])
    names = [name for stage in stages for name in stage.weights.names()]
    assert sorted(names) == sorted(part("tiny-sdxl").weights.names())
    for stage in stages:
        assert set(weight_metas(stage.meta)) == set(stage.weights.names())
        example = stage.example(0)
        assert stage.load().run(example).keys() == {spec.name for spec in stage.outputs}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
@pytest.mark.parametrize("which", ["unet", "text_encoder", "vae_decoder"])
def test_memory_stages_stay_under_their_bound(name: str, which: str) -> None:
    feeds, expected = whole(name, which)
    limit = 150_000
    stages = memory_stages(part(name, which), limit)
    for stage in stages:
        assert 4 * sum(stage.weights.meta(tensor).count for tensor in stage.weights.names()) <= limit
    assert len(stages) == 1 or stages[0].weights.nbytes + stages[1].weights.nbytes > limit / 2
    assert worst(stages_forward(part(name, which), feeds, limit), expected) <= 1e-5


@pytest.mark.slow
def test_full_size_sdxl_fits_stages_of_a_quarter_gigabyte() -> None:
    stages = memory_stages(part("sdxl"), 256 << 20)
    assert max(stage.weights.nbytes for stage in stages) <= 256 << 20
    assert sum(stage.weights.nbytes for stage in stages) == part("sdxl").weights.nbytes == 4 * 2_567_463_684


@pytest.mark.slow
def test_blocks_of_sd15() -> None:
    names = blocks(part("tiny-sd"))
    assert names[:5] == (
        "time_embedding",
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0",
        "down_blocks.0.resnets.1",
    )
    assert names[names.index("mid_block.resnets.0") :][:3] == (
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
    )
    assert names[-1] == "conv_out"
    assert [name for name in names if "samplers" in name] == [
        *(f"down_blocks.{i}.downsamplers.0" for i in range(3)),
        *(f"up_blocks.{i}.upsamplers.0" for i in range(3)),
    ]
    assert block_of("up_blocks.1.attentions.2.transformer_blocks.0") == "up_blocks.1.attentions.2"
    assert block_of("conv_in") == "conv_in"
    assert names == blocks(open_source("arch:sd15").components["unet"])


@pytest.mark.slow
def test_wrong_cuts_are_refused() -> None:
    component = part("tiny-sd")
    with pytest.raises(ConfigError, match=r"did you mean 'mid_block"):
        cut(component, ["mid_block.resnet.0"])
    with pytest.raises(ConfigError, match="one place"):
        cut(component, ["mid_block", "mid_block.resnets.1"])
    with pytest.raises(ConfigError, match="legal: pass, recompute"):
        cut(component, ["mid_block"], embed="both")
    with pytest.raises(ConfigError, match="alone takes"):
        memory_stages(component, 1000)
    with pytest.raises(RunnerError, match="missing timestep"):
        stages_forward(component, {"sample": np.zeros((1, 4, 8, 8), np.float32)})
