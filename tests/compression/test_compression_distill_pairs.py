"""Feature pairs against tables written by hand, and what does not pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_cases import student_of
from torch import nn

from diffship.compression.narrow import first, interiors, narrow_unet
from diffship.core.errors import ConfigError
from diffship.core.weights import MemoryWeights
from diffship.models.parts.component import Component
from diffship.models.parts.unet import unet
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.layouts import LAYOUTS
from diffship.models.reduced.widths import Widths
from diffship.models.sources.opening import open_source
from diffship.training.distillation_pairs import (
    Taps,
    attention_names,
    block_names,
    feature_pairs,
    layout_between,
)

# BK-SDM's feature points, as its released training scripts list them (Base and Small: no mid block)
EQUAL = {f"{side}_blocks.{index}": f"{side}_blocks.{index}" for side in ("down", "up") for index in range(4)}
# Hybrid SD, which is BK-SDM's Tiny: block 2 lost its downsampler, up blocks lost their first
TINY = {
    "down_blocks.0": "down_blocks.0",
    "down_blocks.1": "down_blocks.1",
    "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out",
    "up_blocks.0": "up_blocks.1",
    "up_blocks.1": "up_blocks.2",
    "up_blocks.2": "up_blocks.3",
}
KOALA = {f"{side}_blocks.{index}": f"{side}_blocks.{index}" for side in ("down", "up") for index in range(3)}
TINY_ATTENTION = {
    "down_blocks.0.attentions.0": "down_blocks.0.attentions.0",
    "down_blocks.1.attentions.0": "down_blocks.1.attentions.0",
    "down_blocks.2.attentions.0": "down_blocks.2.attentions.0",
    "up_blocks.0.attentions.0": "up_blocks.1.attentions.0",
    "up_blocks.0.attentions.1": "up_blocks.1.attentions.2",
    "up_blocks.1.attentions.0": "up_blocks.2.attentions.0",
    "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
    "up_blocks.2.attentions.0": "up_blocks.3.attentions.0",
    "up_blocks.2.attentions.1": "up_blocks.3.attentions.2",
}
KOALA_DEPTHS = {
    "down_blocks.1.attentions.0": ("down_blocks.1.attentions.0", 2),
    "down_blocks.2.attentions.0": ("down_blocks.2.attentions.0", 5),
    "up_blocks.0.attentions.0": ("up_blocks.0.attentions.0", 5),
    "up_blocks.0.attentions.1": ("up_blocks.0.attentions.2", 5),
    "up_blocks.1.attentions.0": ("up_blocks.1.attentions.0", 2),
    "up_blocks.1.attentions.1": ("up_blocks.1.attentions.2", 2),
}


@pytest.fixture(scope="module")
def teacher() -> Pipeline:
    return open_source("arch:tiny-sd")


def names(kind: str, student: Pipeline, teacher: Pipeline) -> dict[str, str]:
    found = feature_pairs(kind, student.components["unet"], teacher.components["unet"])
    return {pair.student: pair.teacher for pair in found}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "table"), [("bk-base", EQUAL), ("bk-small", EQUAL), ("bk-tiny", TINY)])
def test_blocks_pair_as_published(layout: str, table: dict[str, str], teacher: Pipeline) -> None:
    assert names("blocks", student_of(teacher, layout), teacher) == table


@pytest.mark.slow
def test_a_narrowed_layout_pairs_like_the_whole_one(teacher: Pipeline) -> None:
    student = student_of(teacher, "hybrid-224m")
    assert student.components["unet"].config["diffship"]["inner"]
    assert names("blocks", student, teacher) == TINY
    assert list(names("self-attention", student, teacher).values()) == [
        f"{name}.transformer_blocks.0.attn1" for name in TINY_ATTENTION.values()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bk-base", "bk-small"])
def test_a_student_pairs_whose_norm_groups_have_one_value_in_the_smallest_picture(
    layout: str, teacher: Pipeline
) -> None:
    whole = student_of(teacher, layout)
    inner = {name: 8 for name in interiors(whole.components["unet"]).inner}
    student = narrow_unet(whole, first(Widths(inner)), {"pass": "test"})
    groups = student.components["unet"].config["norm_num_groups"]
    assert groups == 8 and student.components["unet"].smallest["height"] == 2**3  # the deepest level is 1x1
    assert names("blocks", student, teacher) == EQUAL


@pytest.mark.slow
def test_self_attention_pairs_with_the_layer_that_it_was_copied_from(teacher: Pipeline) -> None:
    leaf = "transformer_blocks.0.attn1"
    table = {f"{own}.{leaf}": f"{other}.{leaf}" for own, other in TINY_ATTENTION.items()}
    assert names("self-attention", student_of(teacher), teacher) == table


@pytest.mark.slow
def test_the_same_topology_pairs_layer_by_layer(teacher: Pipeline) -> None:
    pairs = names("self-attention", teacher, teacher)
    assert len(pairs) == 16 and all(own == other for own, other in pairs.items())
    assert names("none", teacher, teacher) == {}


@pytest.mark.slow
def test_koala_pairs_on_full_size_shapes() -> None:
    student, teacher = open_source("arch:koala-700m"), open_source("arch:sdxl")
    assert names("blocks", student, teacher) == KOALA
    table = {
        f"{own}.transformer_blocks.{depth}.attn1": f"{other}.transformer_blocks.{depth}.attn1"
        for own, (other, depths) in KOALA_DEPTHS.items()
        for depth in range(depths)
    }
    assert names("self-attention", student, teacher) == table


@pytest.mark.parametrize("name", [*LAYOUTS, "bk-v2-tiny"])
def test_a_layout_is_told_from_the_two_configs(name: str) -> None:
    base = {3: "sdxl", 4: "sd21-base" if "v2" in name else "sd15"}
    layout = LAYOUTS[name.replace("-v2", "")]
    student, teacher = open_source(f"arch:{name}"), open_source(f"arch:{base[layout.levels]}")
    found = layout_between(student.components["unet"].config, teacher.components["unet"].config)
    assert found is not None
    assert (found.down, found.up) == (layout.down, layout.up)


def test_a_model_is_no_layout_of_itself(teacher: Pipeline) -> None:
    config = teacher.components["unet"].config
    assert layout_between(config, config) is None


def changed(component: Component, **changes: Any) -> Component:
    return unet({**component.config, **changes}, MemoryWeights({}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("blocks", {"block_out_channels": [16, 24, 32, 40]}, r"down_blocks.3 of the student gives .* teacher=? ?"),
        ("self-attention", {"block_out_channels": [24, 24, 32, 32], "attention_head_dim": 4}, r"down_blocks.0.attent"),
        ("self-attention", {"layers_per_block": 3}, "has neither the teacher's layers nor those of a layout"),
    ],
)
def test_what_does_not_pair_is_refused(kind: str, changes: Any, message: str, teacher: Pipeline) -> None:
    whole = teacher.components["unet"]
    with pytest.raises(ConfigError, match=message):
        feature_pairs(kind, whole, changed(whole, **changes))


@pytest.mark.slow
def test_a_student_with_more_blocks_is_refused(teacher: Pipeline) -> None:
    small = student_of(teacher).components["unet"]
    with pytest.raises(ConfigError, match=r"the teacher has no down_blocks.3 for the student's down_blocks.3"):
        feature_pairs("blocks", teacher.components["unet"], small)


def test_taps_keep_the_first_tensor_of_a_call_and_nothing_between_calls() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x + 2

    root = nn.Sequential(nn.Identity(), nn.Identity())
    root.add_module("two", Two())
    taps = Taps(root, ["two", "0"])
    result, found = taps.gather(lambda: root(torch.ones(1)))
    assert [tensor.item() for tensor in found] == [2.0, 1.0] and len(result) == 2
    root(torch.zeros(1))
    assert [tensor.item() for tensor in found] == [2.0, 1.0]
    with pytest.raises(ZeroDivisionError):
        taps.gather(lambda: 1 / 0)
    assert taps.gather(lambda: root(torch.zeros(1)))[1][1].item() == 0.0


@pytest.mark.slow
def test_names_are_derived_from_the_modules(teacher: Pipeline) -> None:
    """The same table without configs: from what the built networks have."""
    student = student_of(teacher)
    inner = [pipeline.components["unet"].meta.get_submodule("inner") for pipeline in (student, teacher)]
    assert block_names(*inner) == TINY
    parts = student.components["unet"], teacher.components["unet"]
    assert len(attention_names(*parts, *inner)) == 9
