"""Folders as people have them: read as diffusers reads them, or refused with the part and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffship.core.errors import SourceError, UnsupportedError
from diffship.models.model import PipelineModel
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.runtimes.engines.model import open_model

FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "index": "model_index.json",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    return {name: save(open_source(f"arch:{name}"), folder / name) for name in ("tiny-sd", "tiny-sdxl", "tiny-inpaint")}


def changed(source: Path, target: Path, part: str, **values: Any) -> Path:
    """A folder of links to `source`'s files, with other values in one config; `None` takes a key out."""
    for file in source.rglob("*"):
        place = target / file.relative_to(source)
        if file.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes()) if file.suffix == ".json" else place.hardlink_to(file)
    file = target / FILES[part]
    table = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in table.items() if value != "absent"}))
    return target


@pytest.mark.slow
def test_the_index_names_the_class_of_the_scheduler(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(saved["tiny-sd"], tmp_path / "model", "index", scheduler=["diffusers", "EulerDiscreteScheduler"])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder).scheduler
    ours = open_source(str(folder))
    assert json.loads((folder / FILES["scheduler"]).read_text())["_class_name"] != type(theirs).__name__
    assert ours.scheduler["_class_name"] == type(theirs).__name__ == "EulerDiscreteScheduler"
    assert ours.model_index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]


def test_an_inpainting_folder_opens_in_diffusers(saved: dict[str, Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved["tiny-inpaint"])
    assert isinstance(pipeline, diffusers.StableDiffusionInpaintPipeline)
    assert pipeline.unet.config.in_channels == 9


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "vae",
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
            r"vae/config.json: latents_mean is .*scaled by one number",
        ),
        (
            "unet",
            {"in_channels": 8},
            r"unet/config.json: in_channels is 8, .*legal is 4 \(text to image\) or 9 \(inpainting\)",
        ),
        ("unet", {"in_channels": 5}, "in_channels is 5"),
        ("vae", {"out_channels": 4}, "vae/config.json: out_channels is 4; pictures of 3 channels"),  # with transparency
        ("vae", {"in_channels": 6}, "vae/config.json: in_channels is 6"),  # with depth, as LDM3D
    ],
)
def test_models_of_other_kinds_are_refused(
    part: str, values: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_source(str(changed(saved["tiny-sd"], tmp_path / "model", part, **values)))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("unet", {"block_out_channels": "absent"}, "has no block_out_channels"),
        ("unet", {"down_block_types": None}, "unet: its config makes no UNet2DConditionModel; TypeError"),
        ("unet", {"cross_attention_dim": None}, "makes no pipeline"),
        ("unet", {"norm_num_groups": 7}, "unet: its config makes no UNet2DConditionModel; ValueError"),
        ("vae", {"block_out_channels": "absent"}, "vae_encoder: its config makes no AutoencoderKL; IndexError"),
        ("vae", {"norm_num_groups": 7}, "vae_encoder: its config makes no AutoencoderKL; ValueError"),
        ("text", {"num_attention_heads": 3}, "text_encoder: its config makes no CLIPTextModel"),
        ("text", {"hidden_act": "foo"}, "text_encoder: its config makes no CLIPTextModel; KeyError"),
        ("index", {"_diffship": {"guidance_default": "x"}}, "guidance_default is 'x'; it must be a number"),
    ],
)
def test_configs_that_make_no_model_name_the_part(
    part: str, values: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        for component in open_source(str(changed(saved["tiny-sd"], tmp_path / "model", part, **values))).components:
            _ = open_source(str(tmp_path / "model")).components[component].meta


def test_a_vae_that_overflows_stays_in_float32(saved: dict[str, Path], tmp_path: Path) -> None:
    pipeline = open_source(str(changed(saved["tiny-sdxl"], tmp_path / "model", "vae", force_upcast=True)))
    with PipelineModel(pipeline, "cpu", "float16") as model:
        for part, kind in (("vae_decoder", torch.float32), ("text_encoder", torch.float16)):
            runner: Any = model.use(part)
            assert {value.dtype for value in runner._module.parameters()} == {kind}


def test_a_folder_of_components_alone_is_run(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(saved["tiny-sd"], tmp_path / "model", "index")
    (folder / "model_index.json").unlink()
    with open_model(folder) as model:
        assert set(model.parts) == set(open_source(str(saved["tiny-sd"])).components)
