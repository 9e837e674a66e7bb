from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.weights import SeededWeights
from diffship.models.parts.component import Component, weight_metas
from diffship.models.parts.unet import unet
from diffship.models.reduced.layouts import find_layout, student_config
from diffship.models.sources.arch_configs import UNETS
from diffship.models.sources.opening import open_source
from diffship.models.walks.balance import SLACK, Crossing, balanced
from diffship.models.walks.blocks import blocks
from diffship.models.walks.cost import cost, layer_costs
from diffship.models.walks.cuts import (
    KINDS,
    PUBLISHED,
    Cuts,
    find_cuts,
    held_bytes,
    partition,
    published,
    table_of,
    usual_kind,
)
from diffship.runtimes.partition.placement import boundary_bytes, place

# AsyncDiff's tables as its authors wrote them: every device's modules; r, a: resnets and attentions of a block, out:
# conv_norm_out and conv_out, ups, ds: up- and downsampler
ROWS = {
    ("sd15", 2): [
        "conv_in down0 down1 down2 down3 mid up0 up1.r0 up1.a0 up1.r1",
        "up1.a1 up1.r2 up1.a2 up1.ups up2 up3 out",
    ],
    ("sd15", 3): [
        "conv_in down0 down1 down2 down3",
        "mid up0 up1 up2.r0 up2.a0 up2.r1 up2.a1 up2.r2",
        "up2.a2 up2.ups up3 out",
    ],
    ("sd15", 4): [
        "conv_in down0 down1",
        "down2 down3 mid up0 up1.r0 up1.a0 up1.r1",
        "up1.a1 up1.r2 up1.a2 up1.ups up2",
        "up3 out",
    ],
    ("sd21", 2): [
        "conv_in down0 down1 down2 down3 mid up0 up1.r0 up1.a0 up1.r1 up1.a1 up1.r2",
        "up1.a2 up1.ups up2 up3 out",
    ],
    ("sd21", 3): ["conv_in down0 down1 down2 down3", "mid up0 up1 up2", "up3 out"],
    ("sd21", 4): [
        "conv_in down0 down1",
        "down2 down3 mid up0 up1",
        "up2 up3.r0",
        "up3.a0 up3.r1 up3.a1 up3.r2 up3.a2 out",
    ],
    ("sdxl", 2): [
        "down2 mid up0.r0 up0.a0 up0.r1 up0.a1",
        "conv_in down0 down1 up0.r2 up0.a2 up0.ups up1 up2 out",
    ],
    ("sdxl", 3): [
        "down2 mid up0.r0",
        "up0.a0 up0.r1 up0.a1 up0.r2 up0.a2 up0.ups",
        "conv_in down0 down1 up1 up2 out",
    ],
    ("sdxl", 4): [
        "down1.a0 down1.r1 down1.a1 down1.ds down2",
        "mid up0.r0 up0.a0",
        "up0.r1 up0.a1 up0.r2 up0.a2 up0.ups",
        "conv_in down0 down1.r0 up1 up2 out",
    ],
}
REDUCED = {
    "bk-tiny": student_config(find_layout("bk-tiny"), UNETS["tiny-sd"]),
    "no middle": {**UNETS["tiny-sdxl"], "mid_block_type": None, "transformer_layers_per_block": [1, 2, 2]},
}
TRIED = {
    **dict.fromkeys(("tiny-sd", "tiny-sdxl"), (1, 2, 3, 4)),
    **dict.fromkeys(("tiny-lcm", "tiny-inpaint", "tiny-refiner", *REDUCED), (3,)),
}


def short(name: str) -> str:
    """`up_blocks.1.resnets.0` as the table has it: `up1.r0`."""
    for long, brief in (("_blocks.", ""), ("mid_block", "mid"), (".resnets.", ".r"), (".attentions.", ".a")):
        name = name.replace(long, brief)
    return name.replace(".upsamplers.0", ".ups").replace(".downsamplers.0", ".ds").replace("conv_out", "out")


@cache
def part(name: str) -> Component:
    if name in UNETS:
        return open_source(f"arch:{name}").components["unet"]
    config = REDUCED[name]
    empty = unet(config, SeededWeights({}, 0))
    return unet(config, SeededWeights(weight_metas(empty.meta), 3))


def size(component: Component, side: int) -> dict[str, int]:
    """Latents of a square picture, with guidance's two rows."""
    return {**component.smallest_sizes(), "batch_size": 2, "height": side, "width": side}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "stages"), ROWS, ids=str)
def test_published_cuts_give_each_device_the_modules_of_the_table(model: str, stages: int) -> None:
    component = part({"sd15": "tiny-sd", "sdxl": "tiny-sdxl"}.get(model, model))
    cuts = find_cuts(component, stages)
    assert table_of(component.config) == model and cuts == PUBLISHED[model][stages]
    found: list[set[str]] = [set() for _ in range(stages)]
    for stage, home in zip(partition(component, cuts), cuts.homes, strict=True):
        found[home] |= {short(name) for name in blocks(component) if any(_of(name, layer) for layer in stage.layers)}
    expected = [set(row.split()) for row in ROWS[model, stages]]
    for home, modules in enumerate(found):
        covered = {next((name for name in (block, block.split(".")[0]) if name in expected[home]), block)
                   for block in modules - {"time_embedding"}}  # fmt: skip
        assert covered == expected[home]


def _of(block: str, layer: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


def test_all_published_rows_are_in_the_tables() -> None:
    assert {(model, stages) for model in PUBLISHED for stages in PUBLISHED[model]} == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "megabytes", "share"),
    [
        # 1.31 hidden state + 22.9 of skips; 2.62 down1 to the trunk + 5.24 back
        ("sd15", 64, [24.25], 0.75),
        ("sd21", 96, [53.08], 0.836),
        ("sdxl", 128, [5.24, 2.62], 0.77),
    ],
)
def test_bytes_on_the_wire_and_the_share_of_the_larger_stage(
    name: str, side: int, megabytes: list[float], share: float
) -> None:
    component = part(name)
    cuts = published(component.config, 2)
    stages = partition(component, cuts)
    placement = place(stages, cuts.homes)
    links = placement.links(boundary_bytes(stages, size(component, side)))
    assert [link.bytes / 1e6 for link in links] == pytest.approx(megabytes, abs=0.03)
    held = held_bytes(stages, cuts.homes)
    assert max(held) / component.weights.nbytes == pytest.approx(share, abs=0.01)
    # each device has a time embedding of its own; nothing else is there twice
    embedding = sum(
        component.weights.meta(name).nbytes
        for name in component.weights.names()
        if name.startswith(("time_embedding", "add_embedding"))
    )
    assert sum(held) - component.weights.nbytes == embedding


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_stages_of_every_cut_equal_the_whole_bit_for_bit(name: str) -> None:
    component = part(name)
    feeds = component.example(1, {"batch_size": 2})
    expected = component.load().run(feeds)["out_sample"]
    for kind, stages in itertools.product(KINDS, TRIED[name]):
        if kind == "published" and table_of(component.config) is None:
            continue
        cuts = find_cuts(component, stages, kind)
        values: dict[str, Any] = dict(feeds)
        for stage in partition(component, cuts):
            values.update(stage.load().run({spec.name: values[spec.name] for spec in stage.inputs}))
        assert np.array_equal(values["out_sample"], expected), (kind, stages, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_layers_cost_what_the_whole_costs(name: str) -> None:
    component = part(name)
    sizes = {"batch_size": 2, "height": 16, "width": 8}
    whole, each = cost(component, sizes), layer_costs(component, sizes)
    for figure in ("params", "conv_linear_macs", "attention_macs", "bytes"):
        assert sum(getattr(one, figure) for one in each.values()) == getattr(whole, figure)
    assert tuple(each)[:2] == ("time_embedding", "conv_in")


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_balanced_cuts_beat_the_published_ones_at_what_they_are_for(stages: int) -> None:
    for name, side in (("tiny-sd", 16), ("tiny-sdxl", 16)):
        component = part(name)
        figures = {kind: _largest(component, find_cuts(component, stages, kind, size(component, side)), side)
                   for kind in KINDS}  # fmt: skip
        assert figures["speed"][0] <= figures["published"][0] * (1 + SLACK)
        assert figures["memory"][1] <= figures["published"][1] * (1 + SLACK)


def _largest(component: Component, cuts: Cuts, side: int) -> tuple[int, int]:
    found = layer_costs(component, size(component, side))
    stages, macs = partition(component, cuts), [0] * 9
    for stage, home in zip(stages, cuts.homes, strict=True):
        macs[home] += sum(found[layer].macs for layer in stage.layers)
    return max(macs), max(held_bytes(stages, cuts.homes))


@pytest.mark.slow
def test_measured_times_and_unequal_devices_move_the_cut() -> None:
    component = part("tiny-sd")
    names = [name for name in layer_costs(component) if name != "time_embedding"]
    even = dict.fromkeys(names, 1.0)
    middle = find_cuts(component, 2, "speed", times=even)
    third = find_cuts(component, 2, "speed", times=even, speeds=[1.0, 2.0])
    assert names.index(middle.at[0]) + 1 == pytest.approx(len(names) / 2, abs=1)
    assert names.index(third.at[0]) + 1 == pytest.approx(len(names) / 3, abs=1)
    with pytest.raises(ConfigError, match="1 layers have none, first conv_in"):
        find_cuts(component, 2, "speed", times={name: 1.0 for name in names if name != "conv_in"})


COSTS = st.lists(st.integers(1, 9).map(float), min_size=5, max_size=9)
CROSSINGS = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8), st.integers(1, 4), st.integers(1, 50)), max_size=6)


@pytest.mark.slow
@given(COSTS, CROSSINGS, st.integers(2, 4), st.booleans(), st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=4))
@settings(max_examples=150, deadline=None)
def test_the_balance_is_the_best_of_all_cuts(
    costs: list[float], drawn: list[tuple[int, int, int, int]], stages: int, ends: bool, pace: list[float]
) -> None:
    """Every cut is tried: least largest stage, then, among those close to it, least bytes."""
    count, speeds = len(costs), pace[:stages]
    crossings = []
    for written, gap, more, size in drawn:
        read = tuple(sorted({min(written + gap, count - 1), min(written + gap + more, count - 1)}))
        if written < read[0]:
            crossings.append(Crossing(written, read, size))
    homes = [stages - 1, *range(stages)] if ends else list(range(stages))
    tried = {}
    for at in itertools.combinations(range(1, count), len(homes) - 1):
        device = [home for home, (a, b) in zip(homes, itertools.pairwise((0, *at, count)), strict=True)
                  for _ in range(a, b)]  # fmt: skip
        stretch = [k for k, (a, b) in enumerate(itertools.pairwise((0, *at, count))) for _ in range(a, b)]
        load = [sum(c for c, d in zip(costs, device, strict=True) if d == k) / speeds[k] for k in range(stages)]
        sent = sum(
            tensor.bytes
            for tensor in crossings
            for k in {stretch[r] for r in tensor.read}
            if homes[k] != device[tensor.written]
        )
        tried[at] = max(load), sent
    found = tuple(balanced(costs, crossings, stages, speeds, ends))
    limit = min(largest for largest, _ in tried.values()) * (1 + SLACK)
    assert tried[found][0] <= limit + 1e-9
    assert tried[found][1] == min(sent for largest, sent in tried.values() if largest <= limit + 1e-12)


@pytest.mark.slow
def test_what_cannot_be_cut_is_refused() -> None:
    component = part("tiny-sd")
    with pytest.raises(ConfigError, match="stages is 5; published for sd15: 2, 3, 4"):
        find_cuts(component, 5, "published")
    with pytest.raises(ConfigError, match="no cut was published"):
        find_cuts(part("bk-tiny"), 2, "published")
    assert [usual_kind(part(name).config, 3) for name in ("tiny-sd", "bk-tiny")] == ["published", "speed"]
    with pytest.raises(ConfigError, match="did you mean 'speed'"):
        find_cuts(component, 2, "sped")
    with pytest.raises(ConfigError, match="stages is 0"):
        find_cuts(component, 0)
    with pytest.raises(ConfigError, match="ask for fewer stages"):
        find_cuts(component, 500, "speed")
    with pytest.raises(ConfigError, match="take 2 positive ones"):
        find_cuts(component, 2, "speed", speeds=[1.0, 0.0])
    with pytest.raises(UnsupportedError, match="vae_decoder is not partitioned"):
        find_cuts(open_source("arch:tiny-sd").components["vae_decoder"], 2)
    with pytest.raises(ConfigError, match="cannot stand on devices"):
        Cuts(("mid_block",), (1, 0))
