"""One run of the distill pass: parts loaded, pictures encoded, the loop started in the run's folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.compression.trained import trained_schedule
from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError
from diffship.core.job import Job, require_disk
from diffship.core.lazy import lazy
from diffship.core.spec import PRECISIONS
from diffship.models.pipeline import Pipeline
from diffship.training.distillation import DistillationTask, Draws, Forward, Losses
from diffship.training.distillation_data import Captions, make_latents
from diffship.training.distillation_pairs import Pair, feature_pairs
from diffship.training.distillation_report import InTraining, Look, Report
from diffship.training.loop import Schedule, new_accelerator, train
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import accelerate
    import torch

    from diffship.compression.distill import DistillPass
    from diffship.compression.lcm import LcmPass
    from diffship.compression.vae import VaePass
else:
    torch = lazy("torch")

STATE = "state.safetensors"
MIXED = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
_PROMPTS = 8


def train_student(
    options: DistillPass, pipeline: Pipeline, teacher: Pipeline, pictures: PairedPictures, folder: Path, job: Job
) -> None:
    """Train until `options.steps`, from the checkpoint in `folder` if there is one.

    Writes `state.safetensors`, `curve.jsonl`, `curve.png`, `pairs.json` and `validation-STEP.png`. Raises as
    `training.loop.train`.
    """
    accelerator = new_accelerator(MIXED[options.precision])
    require_one_folder(folder, accelerator)
    pairs = feature_pairs(options.features, pipeline.denoiser, teacher.denoiser)
    # weights, their average and two moments, twice while a checkpoint takes the place of the last one
    require_disk(folder, 8 * 4 * _count(pipeline), "the checkpoint of the distillation")
    device, main = accelerator.device, accelerator.is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "pairs.json", json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")
    task = make_task(options, pipeline, teacher, pictures, pairs, job, device, main)
    model = InTraining(pipeline, task.student, str(device))
    look = Look(options.prompts or spread_captions(pictures), pictures.size)
    if options.teacher_steps:  # a few-step teacher has its guidance in its weights
        look = replace(look, steps=(options.teacher_steps,), guidance=1.0)
    report = Report(model, look, folder, lambda text: job.progress(text, 1, 1))
    train(
        task,
        schedule(options, options.rate),
        folder,
        validate=report,
        precision=MIXED[options.precision],
        progress=lambda step, steps: job.progress("distill", step, steps),
    )


def make_task(
    options: DistillPass,
    pipeline: Pipeline,
    teacher: Pipeline,
    pictures: PairedPictures,
    pairs: tuple[Pair, ...],
    job: Job,
    device: torch.device,
    main: bool,
) -> DistillationTask:
    """The task with everything that it needs on `device`; the student in float32."""
    student = pipeline.denoiser.module(str(device))
    if options.checkpointing:
        student.get_submodule("inner").enable_gradient_checkpointing()  # type: ignore[operator]
    side = pictures.size // pipeline.family.vae_factor
    shape = (pipeline.family.latent_channels, side, side)
    return DistillationTask(
        student,
        teacher.denoiser.module(str(device), PRECISIONS[options.teacher_precision]),
        pairs,
        Draws(pictures, options.timesteps(teacher), shape, options.drop, options.flip),
        make_latents(pipeline, pictures, options.flip, options.cache_gib, job, device, main),
        Captions(pipeline, pictures.size, device),
        Forward(torch.tensor(trained_schedule(pipeline).alphas_cumprod()), pipeline.family.prediction_type),
        Losses(options.w_task, options.w_out, options.w_feat, options.weighting != "none"),
        pipeline.denoiser.name,
    )


def schedule(options: DistillPass | LcmPass | VaePass, rate: float) -> Schedule:
    """AdamW as published: betas .9 and .999. `rate` is the learning rate, which a pass may choose by itself."""
    return Schedule(
        steps=options.steps,
        batch=options.batch,
        rate=rate,
        warmup=options.warmup,
        decay=options.decay,
        weight_decay=options.weight_decay,
        clip=options.clip,
        ema=options.ema,
        seed=options.seed,
        save_seconds=options.save_seconds,
        validate_every=options.validate_every,
        accumulate=options.accumulate,
        betas=(0.9, 0.999),
    )


def spread_captions(pictures: PairedPictures, count: int = _PROMPTS) -> tuple[str, ...]:
    """Plain captions of pictures that lie evenly over the data."""
    count = min(count, len(pictures))
    return tuple(pictures.captions(at * len(pictures) // count)[0] for at in range(count))


def _count(pipeline: Pipeline) -> int:
    weights = pipeline.denoiser.weights
    return sum(weights.meta(name).count for name in weights.names())


def require_one_folder(folder: Path, accelerator: accelerate.Accelerator) -> None:
    """Raises ConfigError where the processes of a distributed run would train in different folders."""
    if accelerator.num_processes == 1:
        return
    mark = int.from_bytes(hashlib.sha256(str(folder.resolve()).encode()).digest()[:7], "little")
    span = torch.tensor([mark, -mark], device=accelerator.device)
    torch.distributed.all_reduce(span, op=torch.distributed.ReduceOp.MAX)  # no timeout: torch's own, for every exchange
    if int(span[0]) != -int(span[1]):
        raise ConfigError("the processes have no folder in common; give the job one (compress --cache DIR)")
