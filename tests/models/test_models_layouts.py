"""Published layouts: exact parameter counts, and weight maps against the papers' tables, written down a second time."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from diffship.core.errors import ConfigError, SourceError
from diffship.models.parts.unet import UNet
from diffship.models.reduced.layouts import LAYOUTS, find_layout, layout_widths, shape_of, student_config, weight_map
from diffship.models.reduced.widths import InnerNorm, Widths, widths_of, with_widths
from diffship.models.sources import arch_configs as configs
from diffship.models.sources.opening import open_source
from diffship.models.walks.cost import cost

# guide 0.1: parameters, conv + linear GMAC and attention GMAC of one call with 77 tokens
PUBLISHED = [
    ("bk-base", 579_384_964, 223.7, 37.8),
    ("bk-small", 482_346_884, 217.6, 37.8),
    ("bk-tiny", 323_384_964, 205.0, 37.8),
    ("hybrid-224m", 224_492_676, 151.3, 36.4),
    ("ssd-1b", 1_331_334_404, 1853.8, 250.1),
    ("vega", 745_225_604, 1273.0, 138.3),
    ("koala-1b", 1_161_184_324, 1515.4, 200.5),
    ("koala-700m", 782_822_724, 1176.2, 174.6),
]
# (first part of the student's names, first part of the teacher's): the papers' tables by hand
BK = [
    (f"down_blocks.{b}.{kind}.0", f"down_blocks.{b}.{kind}.0") for b in range(4) for kind in ("resnets", "attentions")
]
BK_UP = [
    (f"up_blocks.{b}.{kind}.{student}", f"up_blocks.{b}.{kind}.{teacher}")
    for b in range(4)
    for kind in ("resnets", "attentions")
    for student, teacher in ((0, 0), (1, 2))
]
TINY_UP = [(student, teacher.replace("up_blocks", "up_blocks+1")) for student, teacher in BK_UP[:12]]
SAMPLERS = [
    (f"{side}_blocks.{b}.{side}samplers", f"{side}_blocks.{b}.{side}samplers")
    for side in ("down", "up")
    for b in (0, 1, 2)
]
TINY_SAMPLERS = [(f"down_blocks.{b}.downsamplers", f"down_blocks.{b}.downsamplers") for b in (0, 1)]
TINY_SAMPLERS += [(f"up_blocks.{b}.upsamplers", f"up_blocks.{b + 1}.upsamplers") for b in (0, 1)]
MID = [("mid_block", "mid_block")]
KOALA = [*BK[:6], *BK_UP[:12], *SAMPLERS[:2], *SAMPLERS[3:5]]
SAME = [(f"{side}_blocks.{b}", f"{side}_blocks.{b}") for side in ("down", "up") for b in range(3)]
TABLES = {
    "bk-base": [*BK, *BK_UP, *SAMPLERS, *MID],
    "bk-small": [*BK, *BK_UP, *SAMPLERS],
    "bk-tiny": [*BK[:6], *TINY_UP, *TINY_SAMPLERS],
    "koala-1b": [*KOALA, *MID],
    "koala-700m": KOALA,
    "ssd-1b": [*SAME, ("mid_block.resnets.0", "mid_block.resnets.0")],
    "vega": [*SAME, ("mid_block.resnets.0", "mid_block.resnets.0")],
}


@cache
def tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an architecture, or of a layout of its teacher."""
    with torch.device("meta"):
        module = UNet(config_of(name)).inner
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def config_of(name: str) -> dict[str, object]:
    if name in configs.UNETS:
        return dict(configs.UNETS[name])
    return student_config(LAYOUTS[name], configs.UNETS[teacher_of(name)])


def teacher_of(name: str) -> str:
    return "sd15" if name.startswith(("bk", "hybrid")) else "sdxl"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "conv_linear", "attention"), PUBLISHED)
def test_counts_are_the_published_ones(name: str, parameters: int, conv_linear: float, attention: float) -> None:
    component = open_source(f"arch:{name}").components["unet"]
    side = 64 if teacher_of(name) == "sd15" else 128
    found = cost(component, {"height": side, "width": side})
    assert found.params == parameters == sum(component.weights.meta(n).count for n in component.weights.names())
    assert found.conv_linear_macs / 1e9 == pytest.approx(conv_linear, rel=1e-3)
    assert found.attention_macs / 1e9 == pytest.approx(attention, rel=2e-3)


def test_hybrid_224m_with_a_time_condition_has_its_published_count() -> None:
    component = open_source("arch:hybrid-224m+lcm").components["unet"]
    assert sum(component.weights.meta(name).count for name in component.weights.names()) == 224_574_596


@pytest.mark.parametrize("name", TABLES)
def test_weight_maps_follow_the_tables_tensor_by_tensor(name: str) -> None:
    teacher = teacher_of(name)
    found = weight_map(LAYOUTS[name], configs.UNETS[teacher], list(tensors(name)))
    assert set(found) == set(tensors(name))
    for student, source in found.items():
        assert tensors(teacher)[source] == tensors(name)[student], student
        assert source == by_table(TABLES[name], student), student


def by_table(table: list[tuple[str, str]], name: str) -> str:
    for student, teacher in table:
        if name.startswith(f"{student}."):
            place = teacher
            if "up_blocks+1" in teacher:
                block = int(teacher.split(".")[1]) + 1
                place = f"up_blocks.{block}." + teacher.split(".", 2)[2]
            return place + name[len(student) :]
    assert not name.startswith(("down_blocks", "up_blocks", "mid_block")), f"{name} is in no table"
    return name


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["sd21", "lcm-sd15", "sd15-inpaint", "tiny-sd", "tiny-refiner"])
@pytest.mark.parametrize("name", ["bk-base", "bk-tiny", "hybrid-224m"])
def test_layouts_apply_to_other_widths_heads_and_projections(name: str, teacher: str) -> None:
    config = student_config(LAYOUTS[name], configs.UNETS[teacher])
    widths = layout_widths(LAYOUTS[name], config)
    with torch.device("meta"):
        student = UNet(with_widths(config, widths)).inner.state_dict()
        whole = UNet(dict(configs.UNETS[teacher])).inner.state_dict()
    for own, source in weight_map(LAYOUTS[name], configs.UNETS[teacher], list(student)).items():
        assert all(a <= b for a, b in zip(student[own].shape, whole[source].shape, strict=True)), own


def test_depths_are_read_as_diffusers_reads_them() -> None:
    shape = shape_of(configs.UNETS["sdxl"])
    assert (shape.down, shape.mid, shape.up) == (((0, 0), (2, 2), (10, 10)), 10, ((10,) * 3, (2,) * 3, (0,) * 3))
    assert shape_of(config_of("ssd-1b")).up == ((4, 4, 10), (2, 1, 1), (0, 0, 0))
    assert shape_of(config_of("koala-700m")).mid == 0


@pytest.mark.parametrize(
    ("name", "teacher", "message"),
    [
        ("koala-700m", "sd15", "the teacher has 4 down blocks; this layout is made of one with 3"),
        ("bk-tiny", "sdxl", "the teacher has 3 down blocks; this layout is made of one with 4"),
        ("koala-1b", "tiny-sdxl", "down block 1 of this layout has"),
    ],
)
def test_a_layout_that_does_not_fit_says_why(name: str, teacher: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student_config(LAYOUTS[name], configs.UNETS[teacher])


def test_a_student_is_no_teacher() -> None:
    with pytest.raises(ConfigError, match="1 layers a block"):
        student_config(LAYOUTS["bk-tiny"], config_of("bk-base"))
    with pytest.raises(ConfigError, match="no mid block"):
        student_config(LAYOUTS["bk-base"], {**configs.UNETS["sd15"], "mid_block_type": None})


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bk-tiny'"):
        find_layout("bk-tny")


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"inner": {"down_blocks.0.resnets.9": 32}}, "unknown layer 'down_blocks.0.resnets.9'"),
        ({"inner": {"down_blocks.0.resnets.0": 12}}, "legal: multiples of 8 up to 16"),
        ({"inner": {"down_blocks.0.resnets.0": 24}}, "legal: multiples of 8 up to 16"),
        ({"heads": {"down_blocks.0.attentions.0.transformer_blocks.0.attn1": 3}}, "its config gives it 2"),
        ({"width": {}}, "unknown key 'width'"),
        ({"inner": {"down_blocks.0.resnets.0": 0}}, "legal is from 1"),
    ],
)
def test_widths_that_cannot_be_are_refused(widths: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message), torch.device("meta"):
        UNet({**configs.UNETS["tiny-sd"], "diffship": widths})


def test_widths_survive_the_config() -> None:
    widths = Widths({"down_blocks.0.resnets.0": 8}, {"down_blocks.0.attentions.0.transformer_blocks.0.attn1": 1})
    assert widths_of(with_widths(configs.UNETS["tiny-sd"], widths)) == widths
    assert "diffship" not in with_widths({"diffship": {}}, Widths())


def test_a_norm_group_of_one_value_becomes_its_shift() -> None:
    torch.manual_seed(0)
    norm = InnerNorm(8, 8)
    torch.nn.init.normal_(norm.bias)
    torch.nn.init.normal_(norm.weight)
    shifted = norm(torch.randn(1, 8, 1, 1))[0, :, 0, 0]
    torch.testing.assert_close(shifted, norm.bias, atol=1e-3, rtol=0)  # values are scaled by 1/sqrt(eps) on the way
    with pytest.raises(ValueError, match="more than 1 value"):
        torch.nn.GroupNorm(8, 8)(torch.randn(1, 8, 1, 1))  # why it is here


def test_other_norm_groups_are_as_ever() -> None:
    torch.manual_seed(0)
    norm, stock = InnerNorm(4, 8), torch.nn.GroupNorm(4, 8)
    stock.load_state_dict(norm.state_dict())
    sample = torch.randn(2, 8, 3, 5)
    assert torch.equal(norm(sample), stock(sample))
