"""One run of the vae pass: what it is told, both auto-encoders loaded, pictures encoded, the loop in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.compression.runs import MIXED, STATE, require_one_folder, require_room, schedule
from diffship.compression.vae_students import NEW, SMALL
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.lazy import lazy
from diffship.core.strict import bounded, bounds, choices
from diffship.models.assemble import with_vae
from diffship.models.parts.autoencoder import TINY
from diffship.models.pipeline import Module, Pipeline
from diffship.training.adversarial import Discriminator
from diffship.training.distillation_data import Encoder, make_latents, signed
from diffship.training.loop import new_accelerator, train
from diffship.training.paired import PairedPictures
from diffship.training.perceptual import JUDGE, NONE, Perceptual
from diffship.training.vae_report import Report, Sides
from diffship.training.vae_task import Draws, Half, Losses, Teacher, Turns, VaeTeaching, halves_of, spread_rows

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

_LOOKED_AT = 8  # pictures of the report


@dataclass(frozen=True)
@bounded
class VaeOptions:
    """What the training of an auto-encoder is told.

    data: folder of pictures (`training.paired`); their captions are not looked at. student: `tiny` (AutoencoderTiny,
    encoder and decoder are trained), `small` (the teacher with a narrower decoder, which alone is trained), or a source
    whose auto-encoder is trained further. width: channels of a tiny one. decoder: channels of a small one's levels, by
    default three quarters of the teacher's. teacher: source of the KL auto-encoder, by default the model's own.
    perceptual: features that pictures are compared by: `judge` (that of `emoji`), `none`, or a folder of LPIPS weights
    (`scripts/prepare_perceptual.py`). w_pixel, w_perceptual, w_adversarial: weights of the decoder's mean absolute
    error, of its distance in the features, and of the discriminator's word, which is scaled to pull as hard as both
    others together. target: what is to come back, the `picture` or what the `teacher` decodes.
    shrink: latents are made smaller by up to this share, at random, for the decoder. colour: share of pictures whose
    colours are mixed anew. filter_every: at every so many steps of the decoder it learns on the worse half of the
    pixels; 0 for never. flip: mirror every other picture.
    disc_start: the step at which the discriminator comes in; w_adversarial=0 for never. disc_alone: for so many steps
    it learns alone. disc_updates: then the decoder learns at one step, the encoder at one and the discriminator at so
    many. disc_rate: its learning rate over that of the others. disc_width: its channels. disc_augment: it sees pictures
    with their colours changed, moved, and a square taken out.
    steps, batch, accumulate: each step's gradient is the mean over `accumulate` batches of `batch` samples, of all
    processes together. rate, warmup, decay: learning rate of AdamW; it rises over `warmup` steps and falls to zero over
    the last `decay`. weight_decay, clip: AdamW's decay, and the greatest norm of a gradient. ema: decay of the averaged
    weights, which are the result; 0 takes the live ones. seed: of everything that is drawn, a new student's weights
    included.
    size: pixels of a side, by default the model's own. precision: fp32, or mixed with bf16. cache_gib: encoded pictures
    are kept in the job's folder if they take no more than this; else they are encoded at every step.
    save_seconds: between checkpoints. validate_every: at every so many of them pictures are drawn and the report is
    made.
    """

    data: str
    student: str = NEW
    width: int = field(default=64, metadata=bounds(1, 1024))
    decoder: tuple[int, ...] = field(default=(), metadata=bounds(1, 65_536))
    teacher: str | None = None
    perceptual: str = JUDGE
    w_pixel: float = field(default=1.0, metadata=bounds(0, 1e6))
    w_perceptual: float = field(default=1.0, metadata=bounds(0, 1e6))
    w_adversarial: float = field(default=0.5, metadata=bounds(0, 1e6))
    target: str = field(default="picture", metadata=choices("picture", "teacher"))
    shrink: float = field(default=0.25, metadata=bounds(0, 0.9))
    colour: float = field(default=0.1, metadata=bounds(0, 1))
    filter_every: int = field(default=3, metadata=bounds(0, 1_000_000))
    flip: bool = False
    disc_start: int = field(default=5000, metadata=bounds(0, 100_000_000))
    disc_alone: int = field(default=0, metadata=bounds(0, 100_000_000))
    disc_updates: int = field(default=5, metadata=bounds(1, 1000))
    disc_rate: float = field(default=50.0, metadata=bounds(1e-6, 1e6))
    disc_width: int = field(default=64, metadata=bounds(4, 1024))
    disc_augment: bool = True
    steps: int = field(default=100_000, metadata=bounds(1, 100_000_000))
    batch: int = field(default=48, metadata=bounds(1, 65_536))
    accumulate: int = field(default=2, metadata=bounds(1, 65_536))
    rate: float = field(default=1e-5, metadata=bounds(1e-12, 1))
    warmup: int = field(default=0, metadata=bounds(0, 100_000_000))
    decay: int = field(default=0, metadata=bounds(0, 100_000_000))
    weight_decay: float = field(default=1e-2, metadata=bounds(0, 1))
    clip: float = field(default=1.0, metadata=bounds(1e-6, 1e6))
    ema: float = field(default=0.99, metadata=bounds(0, 0.999999))
    seed: int = field(default=0, metadata=bounds(0, 2**63 - 1))
    size: int | None = field(default=None, metadata=bounds(64, 1536))
    precision: str = field(default="fp32", metadata=choices("fp32", "bf16"))
    cache_gib: float = field(default=4.0, metadata=bounds(0, 1024))
    save_seconds: float = field(default=180.0, metadata=bounds(0, 1e6))
    validate_every: int = field(default=10, metadata=bounds(1, 1_000_000))

    def __post_init__(self) -> None:
        if not self.w_pixel and not (self.w_perceptual and self.perceptual != NONE):
            raise ConfigError("the decoder has nothing to come near; set w_pixel, or w_perceptual with perceptual")
        if self.decoder and self.student != SMALL:
            raise ConfigError(f"decoder has the widths of a small decoder; set student={SMALL}")
        if self.disc_width % 4:
            raise ConfigError(f"disc_width is {self.disc_width}; legal are multiples of 4")

    def turns(self, student: Module) -> Turns:
        """Who learns when; a KL student has its teacher's encoder."""
        start = self.disc_start if self.w_adversarial and self.disc_start < self.steps else None
        return Turns(start, self.disc_alone, self.disc_updates, student.class_name == TINY)


def train_vae(
    options: VaeOptions,
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
    require_room(folder, trained, f"the checkpoint {STATE}")
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
    options: VaeOptions,
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


def _losses(options: VaeOptions) -> Losses:
    return Losses(
        options.w_pixel,
        options.w_perceptual,
        options.w_adversarial,
        options.shrink,
        options.filter_every,
        options.target == "teacher",
        options.disc_augment,
    )
