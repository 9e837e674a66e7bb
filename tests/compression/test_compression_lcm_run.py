"""Runs of the lcm pass: they learn, stop, resume to the same bits, and leave models and files that others draw with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from distill_cases import pictures_in
from lcm_cases import SMALL, options_for, task_of
from PIL import Image
from safetensors.numpy import load_file

from diffship.compress import compress
from diffship.compression.lora import LoraPass
from diffship.core.errors import Cancelled
from diffship.core.job import Job
from diffship.core.weights import source_digest
from diffship.models.pipeline import Pipeline, converted
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.training.adapters import DOWN, UP
from diffship.training.loop import step_generator

ROOT = Path(__file__).parents[2]
FORMS = ("full", "lora")
RUN = """
import sys
from pathlib import Path
from lcm_cases import SMALL
from diffship.compression.lcm import LcmPass
from diffship.core.job import Job
from diffship.core.weights import source_digest
from diffship.models.sources.opening import open_source
from diffship.training.loop import leave

data, folder, out = sys.argv[1:]
options = LcmPass(data, rank=4, **{**SMALL, "steps": 1, "ema": 0.0, "lora_out": out})
made = options.run(open_source("arch:tiny-sd"), Job(Path(folder)))
print(source_digest(made.components["unet"].weights), flush=True)
leave()
"""


def digest(pipeline: Pipeline) -> str:
    return source_digest(pipeline.components["unet"].weights)


def run_folder(folder: Path) -> Path:
    (found,) = folder.glob("lcm-*")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_thirty_steps_lower_the_loss_and_leave_a_model_that_works(form: str, tmp_path: Path) -> None:
    source = open_source("arch:tiny-sd")
    options = options_for(tmp_path, form=form, steps=30, rate=3e-3 if form == "full" else 1e-2)
    made = options.run(source, Job(tmp_path / "job"))
    before = task_of(options, source, tmp_path)
    after = task_of(options, source, tmp_path)
    state = load_file(run_folder(tmp_path / "job") / "state.safetensors")
    for name, value in after.student.inner.named_parameters():
        if value.requires_grad:
            value.data.copy_(torch.from_numpy(state[f"average/unet/{name}"]))
    losses = [task.loss(32, step_generator(7, 0))[0].item() for task in (before, after)]
    assert losses[1] < 0.9 * losses[0], losses
    entry = made.history[-1]
    assert (entry["pass"], entry["form"], entry["teacher"], entry["pictures"]) == ("lcm", form, "arch:tiny-sd", 6)
    assert (entry["w_min"], entry["w_max"], entry["data"]) == (4.875, 9.75, "data")
    assert len(entry["data_digest"]) == 64 and set(entry["losses"]) == {"loss"}
    json.dumps(entry)
    with Image.open(run_folder(tmp_path / "job") / "validation-000030.png") as image:
        assert image.size == (64, 4 * 64)  # one prompt, with 1, 2, 4 and 8 steps
    again = open_source(str(save(made, tmp_path / "model")))
    feeds = made.components["unet"].example(0)
    first, second = (p.components["unet"].load().run(feeds)["out_sample"] for p in (made, again))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert again.family == made.family and again.scheduler["_class_name"] == "LCMScheduler"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_goes_on_to_the_same_bits(form: str, tmp_path: Path) -> None:
    """The target of the full form is an average, and has to come back, too."""
    source, options = open_source("arch:tiny-sd"), options_for(tmp_path, form=form, steps=8, decay=4)
    whole = digest(options.run(source, Job(tmp_path / "whole")))
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 6

    with pytest.raises(Cancelled, match="run the same command again"):
        options.run(source, Job(tmp_path / "parts", cancel=stop))
    state = load_file(run_folder(tmp_path / "parts") / "state.safetensors")
    (reached,) = {float(value) for name, value in state.items() if name.startswith("step/")}
    assert 0 < reached < 8
    assert digest(options.run(source, Job(tmp_path / "parts"))) == whole
    # done is done, other cadence or not; another seed starts anew
    assert digest(replace(options, save_seconds=5.0).run(source, Job(tmp_path / "parts"))) == whole
    assert len(list((tmp_path / "parts").glob("lcm-*"))) == 1
    assert digest(replace(options, seed=1).run(source, Job(tmp_path / "parts"))) != whole
    assert len(list((tmp_path / "parts").glob("lcm-*"))) == 2


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_make_the_step_of_both_their_batches(tmp_path: Path) -> None:
    """Both see one result, and it is AdamW's first step along the mean of both gradients, computed here alone."""
    (tmp_path / "program.py").write_text(RUN, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [pictures_in(tmp_path / "data"), tmp_path / "job", tmp_path / "out"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    digests = re.findall(r"[0-9a-f]{64}", done.stdout)
    assert len(digests) == 2 and len(set(digests)) == 1
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    task = task_of(options_for(tmp_path, steps=1, ema=0.0), open_source("arch:tiny-sd"), tmp_path)
    for rank in range(2):
        (task.loss(SMALL["batch"] // 2, step_generator(0, 0, rank))[0] / 2).backward()
    live = {name: value for name, value in task.student.inner.named_parameters() if value.requires_grad}
    torch.nn.utils.clip_grad_norm_(live.values(), 1.0)
    torch.optim.AdamW(live.values(), SMALL["rate"], betas=(0.9, 0.999), weight_decay=0.0).step()
    state = load_file(run_folder(tmp_path / "job") / "state.safetensors")
    moved = 0.0
    for name, value in live.items():
        # the first step of Adam is as long as the rate, up or down, if a gradient is not tiny
        clear = value.grad is not None and value.grad.abs() > 1e-6
        if name.endswith(UP):
            found, wanted = torch.from_numpy(state[f"live/unet/{name}"])[clear], value.detach()[clear]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
            moved = max(moved, float(found.abs().max())) if found.numel() else moved
        else:
            assert name.endswith(DOWN)
    assert moved == pytest.approx(SMALL["rate"], rel=1e-2)


@pytest.mark.slow
def test_files_of_a_run_are_its_result(tmp_path: Path) -> None:
    """The lora pass makes of each file what the run returns, in half precision as far as that goes."""
    source = converted(open_source("arch:tiny-sd"), "float16")  # the result is float32 nevertheless
    options = options_for(tmp_path, alpha=8.0, lora_out=str(tmp_path / "fp32"))
    job = Job(tmp_path / "job")
    made = options.run(source, job)
    half = replace(options, lora_out=str(tmp_path / "fp16"), lora_precision="fp16").run(source, job)
    assert digest(half) == digest(made) and len(list((tmp_path / "job").glob("lcm-*"))) == 1  # how is written is no run
    weights = made.components["unet"].weights
    assert {weights.meta(name).dtype for name in weights.names()} == {"float32"}
    feeds = source.components["unet"].example(2)
    wanted = np.asarray(made.components["unet"].load().run(feeds)["out_sample"])
    for precision, tolerance in (("fp32", 1e-5), ("fp16", 1e-3)):
        for name in ("pytorch_lora_weights.safetensors", "kohya/kohya.safetensors", "peft/adapter_model.safetensors"):
            file = tmp_path / precision / name
            assert {value.dtype.name for value in load_file(file).values()} == {f"float{precision[2:]}"}
            fused = compress(source, [LoraPass((str(file),), sampler="lcm")])
            found = np.asarray(fused.components["unet"].load().run(feeds)["out_sample"])
            np.testing.assert_allclose(found, wanted, atol=tolerance)
            assert (fused.scheduler, fused.family) == (made.scheduler, made.family)


@pytest.mark.slow
def test_a_result_without_its_files_is_made_again(tmp_path: Path) -> None:
    """The cache of compress knows the model, and the training is there: the files alone are missing."""
    options = options_for(tmp_path, lora_out=str(tmp_path / "lora"))
    (tmp_path / "lora").mkdir()
    labels: set[str] = set()
    job = Job(tmp_path / "job", progress=lambda label, done, total: labels.add(label))
    compress("arch:tiny-sd", [options], job=job)
    files = sorted(path.name for path in (tmp_path / "lora").rglob("*.*"))
    wanted = ["adapter_config.json", "adapter_model.safetensors", "kohya.safetensors"]
    assert files == [*wanted, "pytorch_lora_weights.safetensors"] and "lcm" in labels
    labels.clear()
    compress("arch:tiny-sd", [replace(options, lora_out=str(tmp_path / "again"))], job=job)
    assert (tmp_path / "again" / "kohya" / "kohya.safetensors").is_file() and "lcm" not in labels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "source", "guidance"),
    [("full", "arch:tiny-sd", 7.5), ("lora", "arch:tiny-sd", 1.0), ("full", "arch:tiny-sdxl", 5.0)],
)
def test_the_command_line_makes_exports_and_draws(
    form: str, source: str, guidance: float, tmp_path: Path, command: Callable[..., dict[str, Any]]
) -> None:
    """`run` takes sampler, steps and guidance from the bundle, and draws what stock diffusers draws of the folder."""
    data, lora = pictures_in(tmp_path / "data"), tmp_path / "lora"
    values: dict[str, Any] = {"data": data, "form": form, "steps": 2, "batch": 2, "rate": 1e-2, "prompts": "apple"}
    values |= {"rank": 4, "lora_out": lora} if form == "lora" else {}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    foreseen = command("compress", source, "--pass", "lcm", *words, "--dry-run")
    assert foreseen["exit_code"] == 0 and not (tmp_path / "model").exists()
    assert command("compress", source, "--pass", "lcm", *words, "-o", tmp_path / "model")["exit_code"] == 0
    assert (lora / "kohya" / "kohya.safetensors").is_file() == (form == "lora")
    names = ("model", "onnx") if source == "arch:tiny-sd" else ("model",)
    if "onnx" in names:
        command("export", tmp_path / "model", "--to", "onnx", "-o", tmp_path / "onnx")
    drawn = {}
    for name in names:
        asked = ("red apple", "--seed", 3, "-o", tmp_path / f"{name}.png")
        document = command("run", tmp_path / name, *asked)
        settings = document["pictures"][0]["settings"]
        assert (settings["sampler"], settings["steps"], settings["guidance"]) == ("lcm", 4, guidance)
        assert document["models"][0]["calls"] == 4 and document["warnings"] == []
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), np.int64)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    kind = "LatentConsistencyModelPipeline" if form == "full" and source == "arch:tiny-sd" else None
    assert kind is None or type(pipe).__name__ == kind
    pipe.set_progress_bar_config(disable=True)
    size = drawn["model"].shape[0]
    facts = {"num_inference_steps": 4, "guidance_scale": guidance, "width": size, "height": size}
    stock = pipe("red apple", generator=torch.Generator().manual_seed(3), **facts).images[0]
    for name, pixels in drawn.items():
        assert np.abs(pixels - np.asarray(stock, np.int64)).max() <= 2, name
