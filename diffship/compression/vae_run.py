"""One run of the vae pass: both auto-encoders loaded, pictures encoded, the loop started in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffship.compression.distill_run import MIXED, STATE, require_one_folder, schedule
from diffship.core.job import Job, require_disk
from diffship.core.lazy import lazy
from diffship.models.assemble import with_vae
from diffship.models.pipeline import Module, Pipeline
from diffship.training.adversarial import Discriminator
from diffship.training.distillation_data import Encoder, make_latents, signed
from diffship.training.loop import new_accelerator, train
from diffship.training.paired import PairedPictures
from diffship.training.perceptual import Perceptual
from diffship.training.vae_report import Report, Sides
from diffship.training.vae_task import Draws, Half, Losses, Teacher, VaeTeaching, halves_of, spread_rows

if TYPE_CHECKING:
    import torch

    from diffship.compression.vae import VaePass
else:
    torch = lazy("torch")

_LOOKED_AT = 8  # pictures of the report


def train_vae(
    options: VaePass,
    teacher: Pipeline,
    student: Module,
    pictures: PairedPictures,
    perceptual: Perceptual,
    folder: Path,
    job: Job,
) -> None:
    """Train until `options.steps`, from the checkpoint in `folder` if there is one.

    Writes `state.safetensors`, `curve.jsonl`, `curve.png`, `report.json` and `validation-STEP.png`. Raises as
    `training.loop.train`.
    """
    accelerator = new_accelerator(MIXED[options.precision])
    require_one_folder(folder, accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    task = make_task(options, teacher, student, pictures, perceptual, job, device, main)
    trained = sum(value.numel() for module in task.modules.values() for value in module.parameters())
    # weights, their average and two moments, twice while a checkpoint takes the place of the last one
    require_disk(folder, 8 * 4 * trained, f"the checkpoint {STATE}")
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    looked = signed(pictures.pixels(spread_rows(len(pictures), _LOOKED_AT))).to(device)
    theirs = task.teacher
    train(
        task,
        schedule(options, options.rate),
        folder,
        validate=Report(
            Sides(theirs.decode, lambda pixels: theirs.encoder.encode(pixels)[0]),
            Sides(task.decoder.decode, None if task.encoder is None else task.encoder.encode),
            looked,
            task.features,
            folder,
            lambda text: job.progress(text, 1, 1),
        ),
        precision=MIXED[options.precision],
        progress=lambda step, steps: job.progress("vae", step, steps),
    )


def make_task(
    options: VaePass,
    teacher: Pipeline,
    student: Module,
    pictures: PairedPictures,
    perceptual: Perceptual,
    job: Job,
    device: torch.device,
    main: bool,
) -> VaeTeaching:
    """The task with everything that it needs on `device`; what is trained is in float32."""
    turns, place = options.turns(student), str(device)
    encoder, decoder = halves_of(with_vae(teacher, student), place)
    discriminator = Discriminator(options.disc_width, options.seed) if turns.start is not None else None
    side, family = pictures.size // teacher.family.vae_factor, teacher.family
    draws = Draws(len(pictures), (family.latent_channels, side, side), options.flip, options.colour)
    return VaeTeaching(
        encoder if turns.encoder else None,
        decoder,
        discriminator,
        Teacher(
            make_latents(teacher, pictures, options.flip, options.cache_gib, job, device, main),
            Encoder(teacher, pictures, device),
            _frozen_decoder(teacher, place),
        ),
        pictures,
        draws,
        perceptual.load(device),
        _losses(options),
        turns,
        options.disc_rate,
    )


def _frozen_decoder(teacher: Pipeline, place: str) -> Half:
    family = teacher.family
    module = teacher.decoder.module(place).requires_grad_(False)
    return Half(module, family.latent_channels, family.scaling_factor, family.shift_factor)


def _losses(options: VaePass) -> Losses:
    return Losses(
        options.w_pixel,
        options.w_perceptual,
        options.w_adversarial,
        options.shrink,
        options.filter_every,
        options.target == "teacher",
        options.disc_augment,
    )
