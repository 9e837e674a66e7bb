"""Runs of the distill pass: they learn, stop, resume to the same bits, survive kills, and leave a model that works."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_cases import SMALL, pictures_in, student_of, task_of
from PIL import Image
from safetensors.numpy import load_file

from diffship.cli.main import main
from diffship.compression.distill import DistillPass
from diffship.core.errors import Cancelled, ConfigError, SourceError
from diffship.core.job import Job
from diffship.core.weights import MemoryWeights, source_digest
from diffship.models.parts.unet import unet
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.training import distillation_data, distillation_report
from diffship.training.distillation_data import make_latents
from diffship.training.distillation_report import read_curve, write_curve
from diffship.training.loop import DivergedError, step_generator

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path
from distill_cases import SMALL, student_of
from diffship.compression.distill import DistillPass
from diffship.core.job import Job
from diffship.core.weights import source_digest
from diffship.models.sources.opening import open_source
from diffship.training.loop import leave

data, folder, seeds = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
student = student_of(open_source("arch:tiny-sd"))
print("ready", flush=True)
for seed in map(int, seeds):
    options = DistillPass(data, steps=24, decay=8, save_seconds=0, validate_every=1000, seed=seed, **SMALL)
    made = options.run(student, Job(folder))
    print(source_digest(made.components["unet"].weights), flush=True)
leave()
"""


@pytest.fixture(scope="module")
def student() -> Pipeline:
    return student_of(open_source("arch:tiny-sd"))


def options_for(folder: Path, **more: Any) -> DistillPass:
    return DistillPass(str(pictures_in(folder / "data")), **{**SMALL, "steps": 30, **more})


def digest(pipeline: Pipeline) -> str:
    return source_digest(pipeline.components["unet"].weights)


def run_folder(folder: Path) -> Path:
    (found,) = folder.glob("distill-*")
    return found


@pytest.mark.slow
def test_thirty_steps_lower_the_loss_and_leave_a_model_that_works(student: Pipeline, tmp_path: Path) -> None:
    options = options_for(tmp_path, weighting="min-snr-5-capped")
    made = options.run(student, Job(tmp_path / "job"))
    before, after = (
        task_of(options, pipeline, Job(tmp_path / "job")).loss(24, step_generator(7, 0))[0].item()
        for pipeline in (student, made)
    )
    assert after < 0.8 * before, (before, after)
    entry = made.history[-1]
    assert entry["pass"] == "distill" and entry["teacher"] == "arch:tiny-sd" and entry["pictures"] == 6
    assert set(entry["losses"]) == {"loss", "task", "out", "feat"} and entry["data"] == "data"
    assert len(entry["data_digest"]) == len(entry["teacher_digest"]) == 64
    json.dumps(entry)
    folder = run_folder(tmp_path / "job")
    for name, size in (("curve.png", (640, 360)), ("validation-000030.png", (256, 64))):
        with Image.open(folder / name) as image:
            assert image.size == size
    assert json.loads((folder / "pairs.json").read_text())[2]["teacher"] == "down_blocks.2.attentions.1.proj_out"
    again = open_source(str(save(made, tmp_path / "model")))
    feeds = made.components["unet"].example(0)
    first, second = (p.components["unet"].load().run(feeds)["out_sample"] for p in (made, again))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert again.history == tuple(json.loads(json.dumps(list(made.history))))


@pytest.mark.slow
@pytest.mark.parametrize("features", ["blocks", "self-attention"])
def test_mixed_precision_checkpointing_and_fresh_latents_go_together(
    features: str, student: Pipeline, tmp_path: Path
) -> None:
    mixed = {"precision": "bf16", "teacher_precision": "bf16", "checkpointing": True, "cache_gib": 0.0, "flip": True}
    options = options_for(tmp_path, features=features, steps=2, batch=2, accumulate=2, **mixed)
    made = options.run(student, Job(tmp_path / "job")).components["unet"].weights
    assert {made.meta(name).dtype for name in made.names()} == {"float32"}
    moved = [np.abs(made.read(name) - student.components["unet"].weights.read(name)).max() for name in made.names()]
    assert np.isfinite(moved).all() and min(moved) > 0
    assert not list((tmp_path / "job").glob("latents-*"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(student: Pipeline, tmp_path: Path) -> None:
    options = options_for(tmp_path, steps=12, decay=4)
    whole = digest(options.run(student, Job(tmp_path / "whole")))
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 8

    with pytest.raises(Cancelled, match="run the same command again"):
        options.run(student, Job(tmp_path / "parts", cancel=stop))
    folder = run_folder(tmp_path / "parts")
    state = load_file(folder / "state.safetensors")
    assert 0 < state["step/unet/conv_in.weight"] < 12
    assert digest(options.run(student, Job(tmp_path / "parts"))) == whole
    # done is done: the same command reads the result, other cadence or not, and another seed starts anew
    stamp = (folder / "state.safetensors").stat().st_mtime_ns
    assert digest(replace(options, save_seconds=5.0).run(student, Job(tmp_path / "parts"))) == whole
    assert (folder / "state.safetensors").stat().st_mtime_ns == stamp
    assert digest(replace(options, seed=1).run(student, Job(tmp_path / "parts"))) != whole
    assert len(list((tmp_path / "parts").glob("distill-*"))) == 2
    assert len(list((tmp_path / "parts").glob("latents-*"))) == 1


def started(data: Path, folder: Path, seeds: str = "0") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(data), str(folder), seeds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit(tmp_path: Path) -> None:
    data, moments = pictures_in(tmp_path / "data"), random.Random(5)
    with started(data, tmp_path / "whole") as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        begin = time.perf_counter()
        expected = process.stdout.readline().strip()
        seconds = time.perf_counter() - begin
    assert len(expected) == 64
    reached = []
    for _ in range(5):
        with started(data, tmp_path / "parts") as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0.3, 0.7) * seconds)
            process.send_signal(signal.SIGKILL)
        states = list((tmp_path / "parts").glob("distill-*/state.safetensors"))
        reached += [int(load_file(states[0])["step/unet/conv_in.weight"])] if states else []
    assert reached == sorted(reached) and reached
    with started(data, tmp_path / "parts") as process:
        assert process.stdout is not None
        assert process.stdout.read().split() == ["ready", expected]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_make_one_student_twice(tmp_path: Path) -> None:
    """Both see the same result, and a second run in the same processes goes well."""
    (tmp_path / "program.py").write_text(RUN, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(pictures_in(tmp_path / "data")), str(tmp_path / "job"), "0,1"],
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
    digests = re.findall(r"[0-9a-f]{64}", done.stdout)  # lines of two processes may run into each other
    assert len(digests) == 4 and len(set(digests)) == 2
    assert len(list((tmp_path / "job").glob("distill-*"))) == 2


@pytest.mark.slow
def test_nan_stops_and_names_what_is_left(student: Pipeline, tmp_path: Path) -> None:
    part = student.components["unet"]
    arrays = {name: part.weights.read(name).copy() for name in part.weights.names()}
    arrays["conv_in.bias"][0] = np.nan
    broken = replace(student, components={**student.components, "unet": unet(part.config, MemoryWeights(arrays))})
    with pytest.raises(DivergedError, match="loss is nan at step 0; no checkpoint was written yet"):
        options_for(tmp_path).run(broken, Job(tmp_path / "job"))


@pytest.mark.slow
def test_the_command_line_distils(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pictures_in(tmp_path / "data")
    values = {"data": data, "steps": 2, "batch": 2, "accumulate": 1, "prompts": "apple,pear"}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "out"
    assert main(["compress", "arch:tiny-sd", "--pass", "distill", *words, "-o", str(out), "--quiet"]) == 0
    assert open_source(str(out)).history[-1]["prompts"] == ["apple", "pear"]
    (data / "0.txt").unlink()
    capsys.readouterr()
    assert main(["compress", "arch:tiny-sd", "--pass", "distill", *words, "-o", str(tmp_path / "no")]) == 2
    assert "1 of 6 pictures have no caption" in capsys.readouterr().err


def test_a_curve_is_read_through_kills(tmp_path: Path) -> None:
    file = tmp_path / "curve.jsonl"
    lines = ['{"step": 20, "loss": 4.0}', '{"step": 40, "lo', '{"step": 40, "loss": 2.0}', '{"step": 20, "loss": 4.5}']
    file.write_text("\n".join(lines), encoding="utf-8")
    assert [(entry["step"], entry["loss"]) for entry in read_curve(file)] == [(20, 4.5), (40, 2.0)]
    write_curve(file, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB"), np.int64)
    black = np.argwhere((pixels.sum(-1) == 0)[20:300, 50:610])
    left, right = black[black[:, 1].argmin()], black[black[:, 1].argmax()]
    assert right[0] - left[0] > 200  # the loss falls from the top of the frame to its bottom
    file.write_text(lines[0], encoding="utf-8")
    write_curve(file, tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()


def test_a_grid_has_white_where_no_picture_is() -> None:
    pictures = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)]
    made = distillation_report.grid(pictures, columns=2)
    assert made.shape == (4, 4, 3)
    assert made[::2, ::2, 0].tolist() == [[10, 20], [30, 255]]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["scheduler", "vae"])
def test_a_corrected_config_is_another_run_with_other_latents(change: str, tmp_path: Path) -> None:
    """Tensors and options are the same: the folder of the job must not give back what the wrong config made."""
    base = open_source("arch:tiny-sd")
    if change == "scheduler":
        other = replace(base, scheduler={**base.scheduler, "beta_end": 0.02})
    else:
        other = replace(base, family=replace(base.family, scaling_factor=1.0))
    step = DistillPass(str(pictures_in(tmp_path / "data")), **{**SMALL, "steps": 1, "teacher": "arch:tiny-sd"})
    assert step._digest(base, base, {}) != step._digest(other, base, {})
    job = Job(tmp_path / "job")
    made = [make_latents(p, step.pictures(p), False, 4.0, job, torch.device("cpu"), True) for p in (base, other)]
    means = [latents.take([0], [False])[0] for latents in made]
    assert torch.equal(*means) == (change == "scheduler")


def test_latents_of_another_version_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, job = open_source("arch:tiny-sd"), Job(tmp_path / "job")
    step = DistillPass(str(pictures_in(tmp_path / "data")), **{**SMALL, "steps": 1, "teacher": "arch:tiny-sd"})
    for version, files in (("0.0", 1), ("0.0", 1), ("0.1", 2)):
        monkeypatch.setattr(distillation_data, "__version__", version)
        make_latents(base, step.pictures(base), False, 4.0, job, torch.device("cpu"), True)
        assert len(list(job.folder.glob("latents-*"))) == files


def test_damaged_latents_are_named(tmp_path: Path) -> None:
    base, job = open_source("arch:tiny-sd"), Job(tmp_path / "job")
    step = DistillPass(str(pictures_in(tmp_path / "data")), **{**SMALL, "steps": 1, "teacher": "arch:tiny-sd"})
    make_latents(base, step.pictures(base), False, 4.0, job, torch.device("cpu"), True)
    (held,) = job.folder.glob("latents-*")
    for kept in (100, 0):
        held.write_bytes(held.read_bytes()[:kept])
        with pytest.raises(SourceError, match=rf"{held.name}: not a valid .*Remove it, and .* encodes the pictures"):
            make_latents(base, step.pictures(base), False, 4.0, job, torch.device("cpu"), True)


@pytest.mark.slow
def test_a_tensor_that_the_module_lacks_is_left_out_after_training(tmp_path: Path) -> None:
    """diffusers opens such files with a warning; the run must not end in an error after its last step."""
    base = open_source("arch:tiny-sd")
    part = base.components["unet"]
    extra = {name: part.weights.read(name) for name in part.weights.names()} | {"ema_decay": np.ones(1, np.float32)}
    source = replace(base, components={**base.components, "unet": replace(part, weights=MemoryWeights(extra))})
    options = {**SMALL, "steps": 1, "features": "none", "teacher": "arch:tiny-sd"}
    trained = DistillPass(str(pictures_in(tmp_path / "data")), **options).run(source, Job(tmp_path / "job"))
    assert set(trained.components["unet"].weights.names()) == set(part.weights.names())


@pytest.mark.parametrize(("kind", "base"), [("folder", None), ("hub", {"id": "mine", "kind": "folder"})])
def test_a_model_of_which_a_folder_is_a_part_names_its_teacher(kind: str, base: Any, tmp_path: Path) -> None:
    made = replace(open_source("arch:tiny-sd"), source={"id": "mine", "kind": kind, "base": base})
    with pytest.raises(ConfigError, match="name the teacher: teacher=SOURCE"):
        DistillPass(str(tmp_path)).teacher_of(made)


def test_a_validation_prompt_that_cannot_be_drawn_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt of the validation has 200000 characters"):
        DistillPass(str(tmp_path), prompts=("x" * 200_000,))
