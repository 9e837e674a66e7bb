"""Passes on models that are not the published ones: other depths, widths, schedulers, files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from distill_cases import pictures_in
from safetensors.torch import save_file
from teachers import teacher_with

from diffship.cli.main import main
from diffship.compress import compress, foresee
from diffship.compression.distill import DistillPass
from diffship.compression.layout import LayoutPass
from diffship.compression.lora import LoraPass
from diffship.compression.significance import SignificancePass
from diffship.core.errors import ConfigError, SourceError, UnsupportedError
from diffship.core.job import Job
from diffship.models.reduced.layouts import shape_of
from diffship.models.saving import save
from diffship.models.sources.arch_configs import lcm_scheduler
from diffship.models.sources.opening import open_source
from diffship.sampling.samplers import make_sampler, noise_schedule
from diffship.training.saving import save_tensors

SMALL: dict[str, Any] = {
    "batch": 2,
    "accumulate": 1,
    "size": 64,
    "steps": 2,
    "features": "none",
    "teacher": "arch:tiny-sd",
}
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}


def mid_depth(config: Any) -> int:
    """Transformer blocks of the mid block as diffusers itself builds it."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return len(UNet2DConditionModel(**plain).mid_block.attentions[0].transformer_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, [1, 1, 1, 2], [1, 2, 1, 3]])
def test_bk_base_keeps_the_mid_block_whole_whatever_its_depth(layers: Any) -> None:
    teacher = teacher_with("arch:tiny-sd", transformer_layers_per_block=layers)
    made = LayoutPass("bk-base").run(teacher, Job()).components["unet"]
    whole = teacher.components["unet"].config
    assert mid_depth(made.config) == mid_depth(whole) == shape_of(made.config).mid > 1
    assert set(made.meta.get_submodule("inner").state_dict()) == set(made.weights.names())


@pytest.mark.parametrize("name", ["bk-tiny", "hybrid-224m"])
def test_levels_of_other_widths_are_refused_and_named(name: str, tmp_path: Path) -> None:
    teacher = teacher_with("arch:tiny-sd", block_out_channels=[16, 24, 32, 48], attention_head_dim=2)
    with pytest.raises(UnsupportedError, match=r"up_blocks\.0\.resnets\.0\.\S+ of shape .* levels are of other widths"):
        compress(teacher, [LayoutPass(name)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_scores_hang_on_everything_that_they_are_drawn_with(tmp_path: Path) -> None:
    folder = save(open_source("arch:tiny-sd"), tmp_path / "m")
    score = SignificancePass(parameters=0.9, count=2, steps=2, keeps=(0.5,), scores_out=str(tmp_path / "scores.json"))

    def scores(cache: str) -> Any:
        score.run(open_source(str(folder)), Job(tmp_path / cache))
        return json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))

    first = scores("cache")
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_act"] == "quick_gelu"
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}), encoding="utf-8")
    again, fresh = scores("cache"), scores("fresh")
    assert again == fresh != first


def test_lcm_keeps_zero_terminal_snr() -> None:
    own = {**open_source("arch:tiny-sd").scheduler, "rescale_betas_zero_snr": True}
    ours = make_sampler(lcm_scheduler(own)).alphas_cumprod()
    theirs = LCMScheduler.from_config(DDIMScheduler.from_config(own).config).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert ours[-1] == 0


@pytest.mark.parametrize(
    "changes", [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "linear", "beta_end": 0.02}]
)
def test_betas_are_read_whatever_the_scheduler_draws_with(changes: dict[str, Any]) -> None:
    own = {**open_source("arch:tiny-sd").scheduler, **changes, "clip_sample": True, "thresholding": True}
    theirs = DDIMScheduler.from_config(own).alphas_cumprod.numpy()
    for name in ("DEISMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "DDIMScheduler"):
        np.testing.assert_allclose(noise_schedule({**own, "_class_name": name}).alphas_cumprod(), theirs, **CLOSE)
    defaults = LCMScheduler().alphas_cumprod.numpy()
    np.testing.assert_allclose(noise_schedule({"_class_name": "LCMScheduler"}).alphas_cumprod(), defaults, **CLOSE)
    with pytest.raises(UnsupportedError, match=r"_class_name is .FlowMatch.* not that of betas"):
        noise_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deis", "half"])
def test_a_model_is_distilled_whatever_it_draws_with_and_from_half_a_teacher(kind: str, tmp_path: Path) -> None:
    model = open_source("arch:tiny-sd")
    more: dict[str, Any] = {"precision": "bf16", "teacher_precision": "fp16"}
    if kind == "deis":
        config = dict(DEISMultistepScheduler.from_config(model.scheduler).config)
        model, more = replace(model, scheduler={**config, "_class_name": "DEISMultistepScheduler"}), {}
    step = DistillPass(str(pictures_in(tmp_path / "data")), **{**SMALL, **more})
    assert step.check(model) == []
    losses = step.run(model, Job(tmp_path / "job")).history[-1]["losses"]
    assert losses and all(np.isfinite(value) for value in losses.values())
    (run,) = (tmp_path / "job").glob("distill-*")
    (run / "curve.jsonl").write_text("", encoding="utf-8")
    assert step.run(model, Job(tmp_path / "job")).history[-1]["losses"] == {}, "the weights are whole without it"


def test_hours_of_distillation_grow_with_the_size_of_its_pictures() -> None:
    steps = [DistillPass("nowhere", **{**SMALL, "size": size}) for size in (64, 128)]
    counts = [[calls.count for calls in step.outline(open_source("arch:tiny-sd")).calls] for step in steps]
    assert [b / a for a, b in zip(*counts, strict=True)] == [4.0, 4.0]


@pytest.mark.slow
def test_files_that_were_asked_for_are_written_although_a_later_pass_is_done(tmp_path: Path) -> None:
    data = str(pictures_in(tmp_path / "data"))

    def made(out: str, **asked: str) -> str:
        score = SignificancePass(parameters=0.9, count=2, steps=2, keeps=(0.5,), **asked)
        learn = DistillPass(data, **SMALL)
        pipeline = compress("arch:tiny-sd", [score, learn], tmp_path / out, job=Job(tmp_path / "cache"))
        return pipeline.components["unet"].digest

    first = made("a")
    assert made("b", scores_out=str(tmp_path / "scores.json")) == first
    assert (tmp_path / "scores.json").is_file()


@pytest.mark.slow
def test_a_download_of_one_variant_opens_although_the_index_of_the_other_came_along(tmp_path: Path) -> None:
    folder = save(open_source("arch:tiny-sd"), tmp_path / "m", dtype="float16")
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": shard}}), encoding="utf-8")
    weights = open_source(str(folder)).components["unet"].weights
    assert weights.meta("conv_in.weight").dtype == "float16"
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(SourceError, match=shard):
        open_source(str(folder))


def test_kohya_files_of_diffusers_under_transformers_5_reach_the_text_encoder(tmp_path: Path) -> None:
    model = open_source("arch:tiny-sd")
    width = model.components["text_encoder"].config["hidden_size"]
    layer = "encoder.layers.0.self_attn.q_proj"
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "lora_down.weight": torch.randn(2, width, generator=draw),
        "lora_up.weight": torch.randn(width, 2, generator=draw),
        "alpha": torch.tensor(2.0),
    }
    texts = []
    for level in ("text_model.", ""):
        stem = f"lora_te_{(level + layer).replace('.', '_')}"
        save_file({f"{stem}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "k.safetensors")
        made = LoraPass((str(tmp_path / "k.safetensors"),)).run(model, Job())
        texts.append(made.components["text_encoder"].weights.read(f"text_model.{layer}.weight"))
    assert np.array_equal(*texts)
    assert not np.array_equal(texts[0], model.components["text_encoder"].weights.read(f"text_model.{layer}.weight"))


def test_gated_attention_is_refused_where_it_is_opened() -> None:
    with pytest.raises(UnsupportedError, match="attention_type = 'gated'"):
        teacher_with("arch:tiny-sd", attention_type="gated")


def test_a_full_disk_is_told_with_the_file_and_leaves_none(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="what was saved before is kept") as caught:
            save_tensors(save_file, {"x": torch.zeros(100_000)}, tmp_path / "state.partial")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "state.partial") and not os.listdir(tmp_path)


@pytest.mark.slow
def test_what_is_left_out_leaves_a_folder_that_stock_diffusers_opens(tmp_path: Path) -> None:
    folder = save(open_source("arch:tiny-sd"), tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    saved = save(open_source(str(folder)), tmp_path / "again")
    assert type(StableDiffusionPipeline.from_pretrained(saved)) is StableDiffusionPipeline


@pytest.mark.slow
def test_a_half_source_is_drawn_by_stock_diffusers_from_what_is_saved(tmp_path: Path) -> None:
    half = save(open_source("arch:tiny-sd"), tmp_path / "half", dtype="float16")
    config = half / "text_encoder" / "config.json"
    facts = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**facts, "dtype": "float16", "torch_dtype": "float16"}), encoding="utf-8")
    saved = compress(str(half), [LayoutPass("bk-tiny")], tmp_path / "small") and tmp_path / "small"
    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    drawn = pipeline("apple", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_a_dry_run_opens_no_data_and_promises_no_hours_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffship.compression.estimate.time_call", lambda *of: 1.0)
    there, gone = (foresee("arch:tiny-sd", [DistillPass(data, **SMALL)]).steps[-1] for data in (str(tmp_path), "none"))
    assert there.seconds is not None and there.seconds > 0 and there.absent == ""
    assert gone.seconds is None and gone.after is not None and gone.absent.startswith("data=none is not a folder here")
    words = ["compress", "arch:tiny-sd", "--pass", "distill", "--set", "data=none", "--dry-run"]
    assert main(words) == 0 and "distill: no hours: data=none is not a folder" in capsys.readouterr().out


def lora_file(folder: Path) -> str:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(2, 16), f"unet.{layer}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, folder / "style.safetensors")
    return str(folder / "style.safetensors")


@pytest.mark.slow
def test_a_fused_lora_is_not_trained_away(tmp_path: Path) -> None:
    """The default teacher is the source, which lacks it: run and dry run refuse, and name what to type."""
    data = str(pictures_in(tmp_path / "data"))
    untaught = {**SMALL, "steps": 1, "teacher": None}
    passes = [LoraPass((lora_file(tmp_path),)), DistillPass(data, **untaught)]
    for refused in (compress, partial(foresee, timing=False)):
        with pytest.raises(ConfigError, match=r"style\.safetensors\) was fused before.*teacher=DIR"):
            refused("arch:tiny-sd", passes)
    fused = compress("arch:tiny-sd", passes[:1], tmp_path / "fused")
    taught = DistillPass(data, **{**SMALL, "steps": 1, "teacher": str(tmp_path / "fused")})
    assert taught.check(fused) == []
    again = open_source(str(tmp_path / "fused"))  # a source that has it already: its own folder must be named
    assert taught.check(again) == []


@pytest.mark.slow
def test_a_model_of_few_steps_does_not_learn_from_one_of_many(tmp_path: Path) -> None:
    lcm = compress("arch:tiny-sd", [LoraPass((lora_file(tmp_path),), sampler="lcm")])
    step = DistillPass(str(pictures_in(tmp_path / "data")), **{**SMALL, "teacher": "arch:tiny-sd"})
    (problem,) = step.check(lcm)
    assert "draws in few steps (LCMScheduler), and its teacher arch:tiny-sd does not" in str(problem)
