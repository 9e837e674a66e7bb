"""Released Hybrid-SD configs: their lists of widths become ours, and lists that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffship.compress import compress
from diffship.compression.layout import LayoutPass
from diffship.core.errors import SourceError, UnsupportedError
from diffship.models.parts.unet import UNet
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.layouts import LAYOUTS, layout_widths, student_config
from diffship.models.reduced.released import LIBRARY, translated
from diffship.models.reduced.widths import widths_now, with_widths
from diffship.models.saving import save
from diffship.models.sources import arch_configs as configs
from diffship.models.sources.opening import open_source

# unet/config.json of the public 224M model, as far as it differs from Stable Diffusion 1.4
PUBLIC = {
    "block_mid_channels": [256, 480, 960, 320, 320, 160, 160, 96, 256],
    "block_selfattn_heads": [8, 4, 6, 6, 8, 8, 4, 8, 8],
    "block_crossattn_heads": [8] * 9,
}
SMALL = student_config(LAYOUTS["bk-small"], configs.UNETS["sd15"])


def public_config() -> dict[str, Any]:
    return {**student_config(LAYOUTS["hybrid-224m"], configs.UNETS["sd15"]), **PUBLIC}


@pytest.mark.parametrize(("condition", "parameters"), [(None, 224_492_676), (256, 224_574_596)])
def test_the_public_lists_are_the_layout(condition: int | None, parameters: int) -> None:
    config = translated({**public_config(), "time_cond_proj_dim": condition})
    layout = student_config(LAYOUTS["hybrid-224m"], configs.UNETS["sd15"])
    widths = layout_widths(LAYOUTS["hybrid-224m"], layout)
    assert config == with_widths({**layout, "time_cond_proj_dim": condition}, widths)
    with torch.device("meta"):
        module = UNet(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def lists_of(pipeline: Pipeline) -> dict[str, list[int]]:
    """The released lists of a narrowed U-Net, read off its module layer by layer."""
    now = widths_now(pipeline.components["unet"].meta.get_submodule("inner"))
    order = sorted(now.inner, key=lambda name: name.startswith("up"))
    heads = {part: {n.split(".transformer")[0]: c for n, c in now.heads.items() if n.endswith(part)} for part in ATTN}
    places = [name.replace("resnets", "attentions") for name in order]
    return {
        "block_mid_channels": [now.inner[name] for name in order],
        "block_selfattn_heads": [heads["attn1"][place] for place in places],
        "block_crossattn_heads": [heads["attn2"][place] for place in places],
    }


ATTN = ("attn1", "attn2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as their code saves it: lists instead of our key, their module as the library."""
    made = compress("arch:tiny-sd", [LayoutPass("hybrid-224m")], tmp_path / "released")
    edit(tmp_path / "released" / "unet" / "config.json", drop="diffship", **lists_of(made))
    edit(tmp_path / "released" / "model_index.json", unet=[LIBRARY, "UNet2DConditionModel"])
    return tmp_path / "released"


def edit(path: Path, drop: str = "", **changes: Any) -> None:
    table = {**json.loads(path.read_text()), **changes}
    table.pop(drop, None)
    path.write_text(json.dumps(table))


@pytest.mark.slow
def test_a_released_folder_opens_and_computes_the_same(folder: Path, tmp_path: Path) -> None:
    ours = compress("arch:tiny-sd", [LayoutPass("hybrid-224m")]).components["unet"]
    opened = open_source(str(folder))
    theirs = opened.components["unet"]
    assert theirs.config["diffship"] == ours.config["diffship"] and not set(PUBLIC) & set(theirs.config)
    feeds = ours.example(2)
    first, second = (np.asarray(part.load().run(feeds)["out_sample"]) for part in (ours, theirs))
    np.testing.assert_array_equal(first, second)
    again = open_source(str(save(opened, tmp_path / "again")))
    assert again.components["unet"].config == theirs.config and again.model_index["unet"][0] == "diffusers"
    alone = open_source(str(folder / "unet"), base="arch:tiny-sd")
    assert alone.components["unet"].config["diffship"] == ours.config["diffship"]


def test_other_code_is_still_refused(folder: Path) -> None:
    for entry in ([LIBRARY, "AutoencoderKL"], [f"{LIBRARY}.x", "UNet2DConditionModel"]):
        edit(folder / "model_index.json", unet=entry)
        with pytest.raises(SourceError, match="code that comes with the model"):
            open_source(str(folder))


@pytest.mark.parametrize("key", PUBLIC)
def test_lists_of_another_length_are_refused(key: str, folder: Path) -> None:
    values = json.loads((folder / "unet" / "config.json").read_text())[key]
    for wrong in (values[:-1], [*values, 8], []):
        edit(folder / "unet" / "config.json", **{key: wrong})
        with pytest.raises(SourceError, match=f"{key} has {len(wrong)} entries; this U-Net takes 9"):
            open_source(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_mid_channels": [0] * 9}, r"legal is from 1 to 65536"),
        ({"block_selfattn_heads": [1.5] * 9}, "must be a whole number"),
        ({"block_crossattn_heads": 8}, "must be a list"),
        ({"diffship": {"inner": {}}}, "legal is one of them"),
    ],
)
def test_lists_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        translated({**public_config(), **change})


def test_a_layer_wider_than_whole_is_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", block_mid_channels=[4096] * 9)
    with pytest.raises(SourceError, match="is 4096 wide inside"):
        open_source(str(folder)).components["unet"].load()


def test_a_mid_block_is_refused() -> None:
    config = {**student_config(LAYOUTS["bk-base"], configs.UNETS["sd15"]), "block_mid_channels": [8] * 13}
    with pytest.raises(UnsupportedError, match="without a mid block only"):
        translated(config)


def test_plain_blocks_have_no_heads_in_the_lists() -> None:
    """BK-SDM-Small, the other U-Net that the released pruner takes: twelve inner widths, nine head counts."""
    inner = [320, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 320, 160]
    found = translated({**SMALL, "block_mid_channels": inner, "block_selfattn_heads": [8, 8, 8, 8, 8, 8, 8, 8, 4]})
    last = "up_blocks.3.attentions.1.transformer_blocks.0.attn1"
    assert found["diffship"]["inner"] == {"up_blocks.3.resnets.1": 160} and found["diffship"]["heads"] == {last: 4}


def test_absent_and_empty_lists_change_nothing() -> None:
    assert translated(SMALL) == SMALL
    assert translated({**SMALL, "block_mid_channels": None}) == SMALL
    whole = [320, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 320, 320]
    assert translated({**SMALL, "block_mid_channels": whole}) == SMALL


@pytest.mark.slow
def test_a_missing_tensor_is_still_named(folder: Path) -> None:
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "unet")
    with pytest.raises(SourceError, match="tensors are missing"):
        open_source(str(folder)).components["unet"].load()
