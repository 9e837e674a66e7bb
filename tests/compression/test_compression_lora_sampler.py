"""Which sampler the result of the lora pass wants: from flags, from headers, from the names of published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffship.cli.flags import request_fields
from diffship.cli.main import parse
from diffship.compress import compress
from diffship.compression.few_steps import FewSteps
from diffship.compression.lora import LoraPass
from diffship.compression.lora_sampler import header_of, wanted
from diffship.core.errors import ConfigError, DiffshipError, SourceError
from diffship.core.strict import load
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.guidance import unheeded

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LCM_HEADER = {"diffship.sampler": "lcm", "diffship.steps": "4", "diffship.original_steps": "25"}


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return open_source("arch:tiny-sd")


def lora_file(base: Pipeline, path: Path, header: dict[str, str] | None = None) -> str:
    """A LoRA of one layer; it is seen in the picture."""
    out, inner = base.components["unet"].weights.meta(f"{LAYER}.weight").shape
    draw = torch.Generator().manual_seed(0)
    pair = {"lora_A": torch.randn(2, inner, generator=draw), "lora_B": torch.randn(out, 2, generator=draw)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"unet.{LAYER}.{role}.weight": value for role, value in pair.items()}, path, header)
    return str(path)


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "eta", "guidance"),
    [
        ("Hyper-SD15-1step-lora.safetensors", "TCDScheduler", 1, 1.0, 1.0),
        ("Hyper-SDXL-8steps-lora.safetensors", "DDIMScheduler", 8, None, 1.0),
        ("Hyper-SD15-12steps-CFG-lora.safetensors", "DDIMScheduler", 12, None, 7.5),
        ("sdxl_lightning_4step_lora.safetensors", "EulerDiscreteScheduler", 4, None, 1.0),
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", "LCMScheduler", 4, None, 1.0),
        (
            "models--h1t--TCD-SD15-LoRA/snapshots/0123abc/pytorch_lora_weights.safetensors",
            *("TCDScheduler", 4, 0.3, 1.0),
        ),
    ],
)
def test_published_files_are_known_by_their_names(
    base: Pipeline, name: str, sampler: str, steps: int, eta: float | None, guidance: float, tmp_path: Path
) -> None:
    made = compress(base, [LoraPass((lora_file(base, tmp_path / name),))])
    assert (made.scheduler["_class_name"], made.scheduler.get("eta")) == (sampler, eta)
    assert (made.family.steps_default, made.family.guidance_default) == (steps, guidance)
    assert made.scheduler["beta_start"] == base.scheduler["beta_start"]
    if sampler in ("DDIMScheduler", "EulerDiscreteScheduler"):
        assert made.scheduler["timestep_spacing"] == "trailing"
    assert "the name" in made.history[-1]["sampler_from"]


@pytest.mark.parametrize(
    "name",
    ["style.safetensors", "my-lcm-lora-tests/pytorch_lora_weights.safetensors", "TCD-SD15-LoRA/style.safetensors"],
)
def test_other_names_say_nothing(base: Pipeline, name: str, tmp_path: Path) -> None:
    made = compress(base, [LoraPass((lora_file(base, tmp_path / name),))])
    assert (made.scheduler, made.family) == (base.scheduler, base.family) and "sampler_from" not in made.history[-1]


def test_a_header_says_it_and_flags_win(base: Pipeline, tmp_path: Path) -> None:
    file = lora_file(base, tmp_path / "lcm.safetensors", LCM_HEADER)
    own = compress(base, [LoraPass((file,))])
    assert (own.scheduler["_class_name"], own.scheduler["original_inference_steps"]) == ("LCMScheduler", 25)
    assert header_of(FewSteps(original_steps=25)) == LCM_HEADER
    more = compress(base, [LoraPass((file,), steps=8)])
    assert (more.scheduler, more.family.steps_default) == (own.scheduler, 8)
    tcd = compress(base, [LoraPass((file,), sampler="tcd", eta=0.5, steps=6)])
    assert (tcd.scheduler["_class_name"], tcd.scheduler["eta"], tcd.family.steps_default) == ("TCDScheduler", 0.5, 6)
    for kept in (LoraPass((file,), sampler="own"), LoraPass((file,), (-1.0,)), LoraPass((file,), (0.0,))):
        assert compress(base, [kept]).scheduler == base.scheduler


def test_a_style_beside_it_says_nothing_and_two_that_differ_are_refused(base: Pipeline, tmp_path: Path) -> None:
    lcm = lora_file(base, tmp_path / "lcm.safetensors", LCM_HEADER)
    style = lora_file(base, tmp_path / "style.safetensors")
    hyper = lora_file(base, tmp_path / "Hyper-SD15-1step-lora.safetensors")
    assert compress(base, [LoraPass((style, lcm), (0.8, 1.0))]).scheduler["_class_name"] == "LCMScheduler"
    with pytest.raises(DiffshipError, match=r"want different samplers or steps \(.*lcm, 4 steps.*tcd, 1 steps"):
        compress(base, [LoraPass((lcm, hyper))])
    assert compress(base, [LoraPass((lcm, hyper), sampler="tcd")]).scheduler["eta"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, "steps or eta without a sampler, and no file says which"),
        ({"eta": 0.5}, "steps or eta without a sampler"),
        ({"eta": 0.5, "sampler": "lcm"}, "eta is 0.5; it is of the sampler tcd, and lcm has none"),
        ({"eta": 1.5, "sampler": "tcd"}, "eta is 1.5; legal is from 0"),
        ({"steps": 4, "sampler": "own"}, "with sampler=own the model keeps its own"),
        ({"sampler": "heun"}, "unknown value 'heun'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Pipeline, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = lora_file(base, tmp_path / "style.safetensors")
    with pytest.raises(DiffshipError, match=message):
        compress(base, [load(LoraPass, {"files": [file], **options}, "pass lora")])


@pytest.mark.parametrize(
    ("header", "message"),
    [({"diffship.sampler": "heun"}, "names the sampler 'heun'"), ({**LCM_HEADER, "diffship.steps": "many"}, "'many'")],
)
def test_a_strange_header_is_named(header: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        wanted(tmp_path / "x.safetensors", header)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_picture_of_tcd_is_that_of_diffusers(base: Pipeline, eta: float, tmp_path: Path) -> None:
    """In the stock pipeline eta is an argument, because no scheduler config has such a key."""
    file = lora_file(base, tmp_path / "Hyper-SD15-1step-lora.safetensors")
    folder = tmp_path / "model"
    compress(base, [LoraPass((file,), steps=4, eta=eta)], folder)
    again = open_source(str(folder))
    (picture,) = generate(PipelineModel(again), Request("red apple", seed=3))
    assert (picture.settings["sampler"], picture.settings["steps"], picture.settings["eta"]) == ("tcd", 4, eta)
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "TCDScheduler"]
    stock = diffusers.StableDiffusionPipeline.from_pretrained(save(again, tmp_path / "stock"))
    stock.set_progress_bar_config(disable=True)
    height, width, _ = picture.pixels.shape
    facts = {"num_inference_steps": 4, "guidance_scale": 1.0, "eta": eta, "width": width, "height": height}
    wanted_picture = stock("red apple", generator=torch.Generator().manual_seed(3), **facts).images[0]
    assert np.abs(picture.pixels.astype(int) - np.asarray(wanted_picture, int)).max() <= 1


def test_eta_of_a_request_replaces_the_models_own(base: Pipeline) -> None:
    model = PipelineModel(base)
    (trajectory,) = start(model, Request("red apple", sampler="tcd", eta=0.25))
    assert trajectory.sampler.to_config()["eta"] == trajectory.sampler.eta == 0.25
    assert start(model, Request("red apple", sampler="tcd"))[0].sampler.eta == 0.0
    with pytest.raises(ConfigError, match="the euler sampler has no eta; it is for tcd"):
        start(model, Request("red apple", sampler="euler", eta=0.25))
    flags = parse(["run", "x", "red apple", "--sampler", "tcd", "--eta", "0.25"])
    assert request_fields(flags) == {"sampler": "tcd", "eta": 0.25}
    with pytest.raises(ConfigError, match="eta is 2"):
        Request("red apple", eta=2.0)


def test_guidance_above_two_warns_for_tcd_as_for_lcm(base: Pipeline) -> None:
    for name in ("LCMScheduler", "TCDScheduler"):
        (text,) = unheeded(base.family, {"_class_name": name}, 2.5, "blurred")
        assert "guidance is 2.5: this model has its guidance in its weights" in text
        assert unheeded(base.family, {"_class_name": name}, 2.0, "blurred") == ()
