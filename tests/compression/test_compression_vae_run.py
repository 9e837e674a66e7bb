"""Runs of the vae pass: they learn, stop, resume to the same bits, and leave models that others draw with."""

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
from PIL import Image
from safetensors.numpy import load_file
from vae_cases import SMALL, STUDENTS, TURNS, options_for, task_of

from diffship.compression.vae import VaePass
from diffship.core.errors import Cancelled, SourceError
from diffship.core.job import Job
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.training.loop import step_generator
from diffship.training.vae_task import DECODER, ENCODER

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path
from vae_cases import SMALL, TURNS
from diffship.compression.vae import VaePass
from diffship.core.job import Job
from diffship.models.sources.opening import open_source
from diffship.training.loop import leave

data, folder = sys.argv[1:]
options = VaePass(data, **{**SMALL, **TURNS, "steps": 6, "colour": 0.0})
made = options.run(open_source("arch:tiny-sd"), Job(Path(folder)))
print(made.components["vae_decoder"].digest, flush=True)
leave()
"""


def digests(pipeline: Pipeline) -> list[str]:
    return [pipeline.components[name].digest for name in (ENCODER, DECODER)]


def run_folder(folder: Path) -> Path:
    (found,) = folder.glob("vae-*")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), STUDENTS.items(), ids=STUDENTS)
def test_thirty_steps_lower_the_loss_and_leave_a_report(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    source = open_source("arch:tiny-sd")
    facts: dict[str, Any] = {
        "steps": 30,
        "rate": 1e-2,
        "perceptual": "judge",
        "target": "teacher",
        "w_adversarial": 0.0,
    }
    options = options_for(tmp_path, **more, **facts, filter_every=0, ema=0.5)
    made = options.run(source, Job(tmp_path / "job"))
    tasks = [task_of(options, source, tmp_path) for _ in range(2)]
    state = load_file(run_folder(tmp_path / "job") / "state.safetensors")
    for half, module in tasks[1].modules.items():
        for key, value in module.named_parameters():
            value.data.copy_(torch.from_numpy(state[f"average/{half}/{key}"]))
    losses = [task.loss(16, step_generator(7, 0))[0].item() for task in tasks]
    assert losses[1] < 0.8 * losses[0], losses
    entry = made.history[-1]
    assert (entry["pass"], entry["perceptual"], entry["teacher"], entry["pictures"]) == (
        "vae",
        "judge",
        "arch:tiny-sd",
        6,
    )
    assert entry["report"]["step"] == 30 and entry["report"]["perceptual"] > 0 and len(entry["perceptual_digest"]) == 64
    assert (entry["report"]["slope"] is None) == (name == "small") and len(made.history) == 1
    json.dumps(entry)
    with Image.open(run_folder(tmp_path / "job") / "validation-000030.png") as image:
        assert image.size == (6 * 64, 3 * 64)
    # what does not learn is the teacher's
    same = source.components[ENCODER].digest == made.components[ENCODER].digest
    assert same == (name == "small") and made.components[DECODER].digest != source.components[DECODER].digest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), STUDENTS.items(), ids=STUDENTS)
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """In the adversarial phase, too: the discriminator comes back with its moments."""
    source, options = (
        open_source("arch:tiny-sd"),
        options_for(tmp_path, **TURNS, **more, steps=12, flip=True, colour=0.5),
    )
    whole = digests(options.run(source, Job(tmp_path / "whole")))
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 9

    with pytest.raises(Cancelled, match="run the same command again"):
        options.run(source, Job(tmp_path / "parts", cancel=stop))
    file = run_folder(tmp_path / "parts") / "state.safetensors"
    reached = {key: float(value) for key, value in load_file(file).items() if key.startswith("step/")}
    critic = {value for key, value in reached.items() if key.startswith("step/discriminator/")}
    assert critic and 0 < min(critic) <= max(reached.values()) < 12
    assert digests(options.run(source, Job(tmp_path / "parts"))) == whole
    ends = [load_file(run_folder(tmp_path / part) / "state.safetensors") for part in ("whole", "parts")]
    assert all(np.array_equal(value, ends[1][key]) for key, value in ends[0].items())
    # done is done, other cadence or not; another seed starts anew
    assert digests(replace(options, save_seconds=5.0).run(source, Job(tmp_path / "parts"))) == whole
    assert digests(replace(options, seed=1).run(source, Job(tmp_path / "parts"))) != whole
    assert len(list((tmp_path / "parts").glob("vae-*"))) == 2


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    options = options_for(tmp_path)
    options.run(open_source("arch:tiny-sd"), Job(tmp_path / "job"))
    file = run_folder(tmp_path / "job") / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"state\.safetensors.*Remove it"):
        options.run(open_source("arch:tiny-sd"), Job(tmp_path / "job"))


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_come_to_one_result(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RUN, encoding="utf-8")
    options = options_for(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), options.data, str(tmp_path / "job")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"[0-9a-f]{64}", done.stdout)
    assert len(found) == 2 and len(set(found)) == 1
    alone = VaePass(options.data, **{**SMALL, **TURNS, "steps": 6, "colour": 0.0})
    assert alone.run(open_source("arch:tiny-sd"), Job(tmp_path / "alone")).components[DECODER].digest != found[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), STUDENTS.items(), ids=STUDENTS)
def test_the_command_line_makes_exports_and_draws(
    name: str, more: dict[str, Any], tmp_path: Path, command: Callable[..., dict[str, Any]]
) -> None:
    """The folder reloads bit for bit, its bundle is proved, both draw one picture, and it can be trained further."""
    options = options_for(tmp_path, **more)
    values = {"data": options.data, "perceptual": "none", "steps": 2, "batch": 2, "accumulate": 1}
    values |= {"student": "small", "decoder": "4,8,8,12"} if name == "small" else {"width": 8}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    made = command("compress", "arch:tiny-sd", "--pass", "vae", *words, "-o", tmp_path / "model")
    assert made["exit_code"] == 0 and made["history"][-1]["pass"] == "vae"
    kept = next((tmp_path / "model.work").glob("result-vae-*"))
    source, again = open_source(str(kept)), open_source(str(tmp_path / "model"))
    assert digests(source) == digests(again) and source.family == again.family
    assert command("export", tmp_path / "model", "--to", "onnx", "-o", tmp_path / "onnx")["exit_code"] == 0
    drawn = {}
    for place in ("model", "onnx"):
        asked = ("red apple", "--seed", 3, "--steps", 2, "-o", tmp_path / f"{place}.png")
        assert command("run", tmp_path / place, *asked)["exit_code"] == 0
        drawn[place] = np.asarray(Image.open(tmp_path / f"{place}.png"), np.int64)
    assert np.abs(drawn["model"] - drawn["onnx"]).max() <= 2
    assert ("vae/config.json" in (tmp_path / "model" / "README.md").read_text()) == (name == "small")
    if name == "tiny":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
        assert type(pipe.vae).__name__ == "AutoencoderTiny" and pipe.vae.config.scaling_factor == 1.0
    else:
        with pytest.raises((ValueError, RuntimeError)):
            diffusers.AutoencoderKL.from_pretrained(tmp_path / "model" / "vae", low_cpu_mem_usage=False)
    values["student"] = tmp_path / "model"
    words = [w for key, value in values.items() if key not in ("width", "decoder") for w in ("--set", f"{key}={value}")]
    further = command("compress", "arch:tiny-sd", "--pass", "vae", *words, "-o", tmp_path / "further")
    assert further["exit_code"] == 0 and further["history"][-1]["student"] == "model"
    assert further["history"][-1]["decoder_parameters"] == made["history"][-1]["decoder_parameters"]
