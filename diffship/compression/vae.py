"""The vae pass: teach a cheap auto-encoder the latents of a KL one, and put it into the pipeline.

The tiny one is TAESD's (AutoencoderTiny), the small one a KL auto-encoder with a narrower decoder, both as Hybrid SD
(arXiv 2408.06646) trains them; `training.vae_task` has the losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffship import __version__
from diffship.compression.distill_run import STATE
from diffship.compression.narrow import count_parameters
from diffship.compression.outline import Calls, Outline
from diffship.compression.swap_vae import require_same_latents, vae_module
from diffship.compression.trained import CADENCE, unplaced
from diffship.compression.vae_run import train_vae
from diffship.compression.vae_students import NEW, SMALL, student_vae, trained_vae
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.job import Job, digest_of
from diffship.core.problem import Problem, met
from diffship.core.strict import bounded, bounds, choices, plain
from diffship.core.weights import SafetensorsWeights, source_digest
from diffship.models.assemble import with_vae
from diffship.models.autoencoder import KL, TINY, decoder_widths
from diffship.models.pipeline import Module, Pipeline, recorded
from diffship.training.checkpoint import reached
from diffship.training.paired import PairedPictures
from diffship.training.perceptual import JUDGE, NONE, Perceptual
from diffship.training.vae_report import read_report
from diffship.training.vae_task import DECODER, DISCRIMINATOR, ENCODER, Turns


@dataclass(frozen=True)
@bounded
class VaePass:
    """Train a cheap auto-encoder on pictures against a KL one; U-Net and text encoders stay as they are.

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

    kind: ClassVar[str] = "vae"
    role: ClassVar[str] = "decoder"  # whose cost a dry run tells

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

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: a teacher or student that does not fit, data or features that cannot be read."""
        looks = (
            ("vae", partial(self._made, pipeline)),
            ("data", partial(self.pictures, pipeline)),
            ("perceptual", self.features),
        )
        return [*unplaced(pipeline, self.pixels(pipeline), self.batch, self.precision), *met(looks)]

    def outline(self, pipeline: Pipeline) -> Outline:
        """The student's shapes, and calls of both auto-encoders; the discriminator and the features come on top."""
        teacher = self.teacher_of(pipeline)
        student = self.student_of(teacher)
        made = with_vae(pipeline, student)
        return Outline(made, tuple(self._calls(teacher, made, self.turns(student))))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the averaged auto-encoder in float32, and with its scale of latents.

        The run lives in the job's folder as `vae-` and a digest of options, teacher, student, data and features; a run
        that was stopped goes on from its last checkpoint, to the same bits.

        Raises:
            ConfigError: the teacher has other latents than the model.
            DivergedError: the loss is not finite; the last good checkpoint is kept.
            SourceError: a picture is damaged.
        """
        teacher, pictures, features = self.teacher_of(pipeline), self.pictures(pipeline), self.features()
        if self.teacher is not None:
            require_same_latents(pipeline, teacher)
        job.progress(f"{pictures.told}; captions are not looked at", 1, 1)
        student = self.student_of(teacher)
        theirs = [half.digest for half in (teacher.encoder, teacher.decoder)]
        digests = {"teacher_digest": digest_of(theirs), "data_digest": pictures.digest}
        folder = job.folder / f"vae-{self._key(teacher, student, features, digests)}"
        if reached(folder / STATE) < self.steps:
            train_vae(self, teacher, student, pictures, features, folder, job)
        report = read_report(folder)
        made = with_vae(pipeline, trained_vae(student, SafetensorsWeights(folder / STATE)))
        entry = {**self._entry(pipeline, features), **digests, "pictures": len(pictures), "report": report}
        if self.student == SMALL:
            entry["decoder"] = list(decoder_widths(made.decoder.config))
        before, after = (count_parameters(one.decoder.weights) for one in (teacher, made))
        counts = {"decoder_parameters_before": before, "decoder_parameters": after}
        return recorded(made, {**entry, **counts})

    def pixels(self, pipeline: Pipeline) -> int:
        """Side of the pictures that are trained on."""
        return self.size or pipeline.family.default_size

    def pictures(self, pipeline: Pipeline) -> PairedPictures:
        """Raises SourceError if the data cannot be used."""
        return PairedPictures.open(Path(self.data).expanduser(), self.pixels(pipeline))

    def features(self) -> Perceptual:
        """Raises SourceError if the features that are named cannot be used."""
        return Perceptual.find(self.perceptual if self.w_perceptual else NONE)

    def turns(self, student: Module) -> Turns:
        """Who learns when; a KL student has its teacher's encoder."""
        start = self.disc_start if self.w_adversarial and self.disc_start < self.steps else None
        return Turns(start, self.disc_alone, self.disc_updates, student.class_name == TINY)

    def teacher_of(self, pipeline: Pipeline) -> Pipeline:
        """`pipeline` with the teacher's auto-encoder, no tensor read yet.

        Raises:
            UnsupportedError: the teacher is no AutoencoderKL.
            ConfigError: its latents are of another shape.
        """
        found = pipeline if self.teacher is None else with_vae(pipeline, vae_module(self.teacher))
        name = found.decoder.class_name
        if name != KL:
            raise UnsupportedError(
                f"the teacher is an {name}, which learnt from another one; name an {KL}: teacher=SOURCE"
            )
        return found

    def student_of(self, teacher: Pipeline) -> Module:
        """Class, config and first weights of what is trained.

        Raises:
            ConfigError, SourceError, UnsupportedError: the student does not fit the teacher, or cannot be read.
        """
        return student_vae(self.student, teacher, self.width, self.decoder, self.seed)

    def _made(self, pipeline: Pipeline) -> None:
        teacher = self.teacher_of(pipeline)
        with_vae(pipeline, self.student_of(teacher))

    def _calls(self, teacher: Pipeline, made: Pipeline, turns: Turns) -> Iterator[Calls]:
        size = (self.pixels(made) / made.family.default_size) ** 2
        samples = self.batch * self.accumulate * size
        counts = {part: turns.learnt(part, self.steps) for part in (ENCODER, DECODER, DISCRIMINATOR)}
        filtered = counts[DECODER] / self.filter_every if self.filter_every else 0.0
        taught = counts[DECODER] + counts[DISCRIMINATOR] if self.target == "teacher" else 0
        ours, theirs = made.components, teacher.components
        yield Calls(ours[DECODER], samples * (3 * counts[DECODER] + counts[DISCRIMINATOR] + filtered))
        if turns.encoder:
            yield Calls(ours[ENCODER], samples * 3 * counts[ENCODER])
        yield Calls(theirs[DECODER], samples * (taught + filtered))
        yield Calls(theirs[ENCODER], samples * (self.colour * self.steps + filtered))

    def _entry(self, pipeline: Pipeline, features: Perceptual) -> dict[str, Any]:
        unsaid = {NEW: ("decoder",), SMALL: ("width",)}.get(self.student, ("decoder", "width"))
        said = {name: value for name, value in asdict(self).items() if name not in unsaid}
        said |= {"data": Path(self.data).name}
        said |= {"perceptual": features.network, "perceptual_digest": features.digest}
        said |= {"student": Path(self.student).name if Path(self.student).expanduser().is_dir() else self.student}
        if self.teacher is None:
            said["teacher"] = str(pipeline.source.get("id"))
        return {"pass": self.kind, **said}

    def _key(self, teacher: Pipeline, student: Module, features: Perceptual, digests: dict[str, str]) -> str:
        aside = (*CADENCE, "data", "teacher", "student", "perceptual")
        options = {name: value for name, value in plain(self).items() if name not in aside}
        vae = [teacher.decoder.config, student.class_name, student.config]
        first = source_digest(student.weights)
        facts = [__version__, options, digests, features.network, features.digest, plain(vae), first]
        return digest_of([*facts, self.pixels(teacher)])[:40]
