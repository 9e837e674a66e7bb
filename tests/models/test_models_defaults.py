"""Keys that a config lacks, against the classes of diffusers and transformers themselves."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig

from diffship.core.registry import kinds
from diffship.kinds.stock import repaired_unet
from diffship.models.saving import save
from diffship.models.sources.defaults import completed
from diffship.models.sources.opening import open_source
from diffship.sampling.samplers import WITH_BETAS

CLASSES = {name: stock for kind in kinds().values() for name, stock in kind.classes.items()}


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"])
def test_absent_keys_have_the_defaults_of_diffusers_class(name: str) -> None:
    given = {"block_out_channels": [320, 640, 1280, 1280]} if name == "UNet2DConditionModel" else {"act_fn": "relu"}
    with torch.device("meta"):
        theirs = dict(getattr(diffusers, name)(**given).config)
    found = completed(name, given)
    assert found == {key: list(theirs[key]) if isinstance(theirs[key], tuple) else theirs[key] for key in found}
    assert {"in_channels", "act_fn"} <= found.keys()


def test_absent_keys_of_a_text_encoder_have_transformers_defaults() -> None:
    found, theirs = completed("CLIPTextModel", {"hidden_size": 8, "eos_token_id": 2}), CLIPTextConfig()
    assert (found["hidden_size"], found["eos_token_id"]) == (8, 2)
    assert found["num_hidden_layers"] == theirs.num_hidden_layers and found["hidden_act"] == theirs.hidden_act


@pytest.mark.slow
@pytest.mark.parametrize(("source", "wide"), [("arch:tiny-sdxl", True), ("arch:tiny-sd", False)])
def test_an_absent_force_upcast_keeps_sdxls_vae_wide_and_no_other(source: str, wide: bool, tmp_path: Path) -> None:
    """The class says true; the SD pipelines never ask, those of SDXL do."""
    folder = save(open_source(source), tmp_path / "model")
    config = json.loads((folder / "vae/config.json").read_text())
    config.pop("force_upcast", None)
    (folder / "vae/config.json").write_text(json.dumps(config))
    assert open_source(str(folder)).components["vae_decoder"].overflows_half is wide


@pytest.mark.parametrize(
    ("version", "size", "found"),
    [
        ("0.8.1", 32, 64),
        ("0.2.4", 32, 64),
        ("0.9.0.dev0", 32, 32),
        ("0.30.0", 32, 32),
        ("0.6.0", 96, 96),
        (None, 32, 32),
    ],
)
def test_sizes_from_before_0_9_are_not_believed(version: str | None, size: int, found: int) -> None:
    config = {"sample_size": size, **({} if version is None else {"_diffusers_version": version})}
    assert repaired_unet(CLASSES["StableDiffusionPipeline"], config)["sample_size"] == found
    assert repaired_unet(CLASSES["StableDiffusionXLPipeline"], config)["sample_size"] == size


def test_the_defaults_of_the_classes_are_those_of_diffusers() -> None:
    for name, stock in CLASSES.items():
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        told = {key: parameters[key].default for key in ("guidance_scale", "num_inference_steps")}
        assert told == {"guidance_scale": stock.guidance, "num_inference_steps": stock.steps}
        if "Inpaint" in name:
            assert parameters["strength"].default == stock.strength


def test_schedulers_with_betas_are_those_whose_class_takes_them() -> None:
    found = [getattr(diffusers, name) for name in WITH_BETAS]
    real = [kind for kind in found if ".dummy_" not in kind.__module__]  # the others need scipy or torchsde
    assert len(real) >= len(found) - 3
    for kind in real:
        assert "beta_start" in inspect.signature(kind.__init__).parameters, kind
