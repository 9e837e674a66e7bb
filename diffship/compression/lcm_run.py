"""One run of the lcm pass: parts loaded, pictures encoded, the loop started in the run's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffship.compression.distill_run import MIXED, require_one_folder, schedule, spread_captions
from diffship.compression.lora_write import TrainedLora
from diffship.compression.trained import averaged_weights, trained_schedule
from diffship.core.dtype import TensorMeta
from diffship.core.job import Job, require_disk
from diffship.core.lazy import lazy
from diffship.core.spec import PRECISIONS
from diffship.core.weights import Derived, SafetensorsWeights, Weights, renamed
from diffship.models.assemble import with_denoiser
from diffship.models.pipeline import Pipeline
from diffship.training.adapters import add_lora
from diffship.training.consistency import Consistency, Diffusion
from diffship.training.consistency_task import ConsistencyTask, GuidedDraws
from diffship.training.distillation import Draws
from diffship.training.distillation_data import Captions, make_latents
from diffship.training.distillation_report import InTraining, Look, Report
from diffship.training.loop import new_accelerator, train
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffship.compression.lcm import LcmPass
else:
    torch = lazy("torch")

LOOKS = (1, 2, 4, 8)  # steps of the pictures that are looked at
WIDTH = 256  # of the guidance embedding, as published
_PROJECTION = "time_embedding.cond_proj.weight"


def train_consistency(
    options: LcmPass, student: Pipeline, teacher: Pipeline, pictures: PairedPictures, folder: Path, job: Job
) -> None:
    """Train until `options.steps`, from the checkpoint in `folder` if there is one.

    `student` has the LCM sampler already. Writes `state.safetensors`, `curve.jsonl`, `curve.png` and
    `validation-STEP.png`. Raises as `training.loop.train`.
    """
    accelerator = new_accelerator(MIXED[options.precision])
    require_one_folder(folder, accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    task = make_task(options, student, teacher, pictures, job, device, main)
    trained = sum(value.numel() for value in task.student.parameters() if value.requires_grad)
    # weights, their average and two moments, twice while a checkpoint takes the place of the last one
    require_disk(folder, 8 * 4 * trained, "the checkpoint of the distillation")
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    look = Look(options.prompts or spread_captions(pictures), pictures.size, LOOKS)
    model = InTraining(student, task.student, str(device))
    train(
        task,
        schedule(options, options.learning_rate),
        folder,
        validate=Report(model, look, folder, lambda text: job.progress(text, 1, 1)),
        precision=MIXED[options.precision],
        progress=lambda step, steps: job.progress("lcm", step, steps),
        follow=task.follow,
    )


def make_task(
    options: LcmPass,
    student: Pipeline,
    teacher: Pipeline,
    pictures: PairedPictures,
    job: Job,
    device: torch.device,
    main: bool,
) -> ConsistencyTask:
    """The task with everything that it needs on `device`; what is trained is in float32."""
    side = pictures.size // student.family.vae_factor
    shape = (student.family.latent_channels, side, side)
    alphas = torch.tensor(trained_schedule(student).alphas_cumprod())
    path = Diffusion(alphas, student.family.prediction_type)
    return ConsistencyTask(
        _trainable(options, student, device),
        _frozen(options, teacher, device),
        GuidedDraws(
            Draws(pictures, options.times(student), shape, options.drop, options.flip), *options.guidances(teacher)
        ),
        make_latents(student, pictures, options.flip, options.cache_gib, job, device, main),
        Captions(student, pictures.size, device),
        Consistency(path, options.span(student), options.loss),
        student.family.time_cond_dim,
        student.denoiser.name,
    )


def _trainable(options: LcmPass, student: Pipeline, device: torch.device) -> nn.Module:
    module = student.denoiser.module(str(device))
    inner = module.get_submodule("inner")
    if student.family.time_cond_dim is None:
        add_lora(inner, options.rank, options.rank if options.alpha is None else options.alpha, options.seed)
    else:
        inner.requires_grad_(True)
    if options.checkpointing:
        inner.enable_gradient_checkpointing()  # type: ignore[operator]
    return module


def _frozen(options: LcmPass, teacher: Pipeline, device: torch.device) -> nn.Module | None:
    if options.form == "lora" and options.teacher is None:
        return None
    return teacher.denoiser.module(str(device), PRECISIONS[options.teacher_precision])


def lora_of(options: LcmPass, state: SafetensorsWeights) -> TrainedLora:
    """The averaged LoRA of a checkpoint."""
    alpha = float(options.rank if options.alpha is None else options.alpha)
    return TrainedLora(renamed(state, averaged_weights(state)), options.rank, alpha)


def embedded(pipeline: Pipeline) -> Pipeline:
    """`pipeline` with a U-Net that also takes guidance, as an embedding 256 wide, and does not yet heed it.

    The new projection is zero, so that training begins with the teacher itself; diffusers' script draws it.
    """
    unet = pipeline.denoiser
    config = {**unet.config, "time_cond_proj_dim": WIDTH}
    channels = int(config["block_out_channels"][0])
    made = with_denoiser(pipeline, config, _Projecting(unet.weights, channels), {})
    return replace(made, history=pipeline.history, model_index=pipeline.model_index)


class _Projecting(Derived):
    """Weights of a U-Net, and a projection of zeros for the guidance embedding."""

    def __init__(self, weights: Weights, channels: int) -> None:
        super().__init__(weights)
        self._shape = (channels, WIDTH)

    def names(self) -> tuple[str, ...]:
        return (*self._weights.names(), _PROJECTION)

    def meta(self, name: str) -> TensorMeta:
        return TensorMeta("float32", self._shape) if name == _PROJECTION else self._weights.meta(name)

    def read(self, name: str) -> NDArray[np.generic]:
        return np.zeros(self._shape, np.float32) if name == _PROJECTION else self._weights.read(name)
