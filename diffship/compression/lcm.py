"""The lcm pass: distil a guided model into one that draws in a few steps without guidance.

Latent consistency models (Luo et al., arXiv 2310.04378) as a whole U-Net, and LCM-LoRA (arXiv 2311.05556) as low-rank
changes that other models of the same base take, too. `training.consistency` has the equations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffship.compression.distill_run import STATE
from diffship.compression.few_steps import as_lcm
from diffship.compression.lcm_run import embedded, lora_of, train_consistency
from diffship.compression.lora_file import with_deltas
from diffship.compression.lora_write import require_lora_place, write_lora
from diffship.compression.outline import Calls, Outline
from diffship.compression.trained import (
    require_agreement,
    run_key,
    trained_schedule,
    trained_weights,
    untrainable,
)
from diffship.core.distributed import first_process
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.job import Job
from diffship.core.problem import Problem, met
from diffship.core.spec import PRECISIONS
from diffship.core.strict import bounded, bounds, choices
from diffship.core.weights import SafetensorsWeights, cast
from diffship.models.arch_configs import lcm_scheduler
from diffship.models.assemble import with_denoiser
from diffship.models.pipeline import Pipeline, converted, recorded
from diffship.models.sources import open_source
from diffship.sampling.samplers import make_sampler
from diffship.sampling.tokenizer import check_prompt
from diffship.training.checkpoint import reached
from diffship.training.consistency import LOSSES, PREDICTIONS
from diffship.training.distillation_report import read_curve
from diffship.training.paired import PairedPictures

FULL, LORA = "full", "lora"
_RATES = {FULL: 1e-6, LORA: 1e-4}  # those of diffusers' training scripts
_STEPS_DEFAULT = 4


@dataclass(frozen=True)
@bounded
class LcmPass:
    """Train the U-Net on captioned pictures to draw in 1 to 8 steps; text encoders and auto-encoder stay as they are.

    data: folder of captioned pictures (`training.paired`). form: `full` trains the whole U-Net, which then takes
    guidance as an input; `lora` trains low-rank changes and adds them to the U-Net, which then takes no guidance.
    teacher: source of the model whose trajectories are learnt, by default the model itself; for a pruned model, name
    the one that it was made of, if that draws better.
    rank, alpha: of the LoRA; alpha is the rank if none is given. lora_out: folder for the LoRA in three forms:
    diffusers', peft's and kohya's. lora_precision: of these files.
    w_min, w_max: the range of guidance, less one, that the teacher is guided with (w = guidance scale - 1). By default
    three quarters, and one and a half times, of the teacher's own guidance less one.
    original_steps: the number of timesteps that are trained, evenly spaced; the LCM sampler chooses among them. skip:
    how many timesteps one DDIM step of the teacher passes over, by default those from one of them to the next. More of
    them (40, say) need less training, and follow the teacher less exactly. loss: `huber` (pseudo-Huber, c = 0.001) or
    `l2`.
    steps, batch, accumulate: each step's gradient is the mean over `accumulate` batches of `batch` samples, of all
    processes together. rate, warmup, decay: learning rate of AdamW, by default 1e-6 (full) or 1e-4 (lora); it rises
    over `warmup` steps and falls to zero over the last `decay`. weight_decay, clip: AdamW's decay, and the greatest
    norm of a gradient. ema: decay of the averaged weights, which are the result, and the target of the full form; 0
    takes the live ones. seed: of everything that is drawn.
    size: pixels of a side, by default the model's own. flip: mirror every other picture. drop: share of captions that
    are dropped, so that a LoRA also learns pictures without a caption.
    precision: fp32, or mixed with fp16 or bf16. teacher_precision: of the weights of a teacher of its own, which the
    full form always has, and the lora form if `teacher` is given. checkpointing: compute activations twice instead of
    keeping them. cache_gib: encoded pictures are kept in the job's folder if they take no more than this; else they
    are encoded at every step.
    save_seconds: between checkpoints. validate_every, prompts: pictures of `prompts` (by default eight captions) are
    drawn with 1, 2, 4 and 8 steps, a row each, at every so many checkpoints.
    """

    kind: ClassVar[str] = "lcm"

    data: str
    form: str = field(default=LORA, metadata=choices(FULL, LORA))
    teacher: str | None = None
    rank: int = field(default=64, metadata=bounds(1, 1024))
    alpha: float | None = field(default=None, metadata=bounds(1e-3, 1e6))
    lora_out: str | None = field(default=None, metadata={"output": True})
    lora_precision: str = field(default="fp32", metadata=choices("fp32", "fp16"))
    w_min: float | None = field(default=None, metadata=bounds(0, 34))
    w_max: float | None = field(default=None, metadata=bounds(0, 34))
    original_steps: int = field(default=50, metadata=bounds(8, 1000))
    skip: int | None = field(default=None, metadata=bounds(1, 250))
    loss: str = field(default="huber", metadata=choices(*LOSSES))
    steps: int = field(default=1000, metadata=bounds(1, 100_000_000))
    batch: int = field(default=12, metadata=bounds(1, 65_536))
    accumulate: int = field(default=1, metadata=bounds(1, 65_536))
    rate: float | None = field(default=None, metadata=bounds(1e-12, 1))
    warmup: int = field(default=0, metadata=bounds(0, 100_000_000))
    decay: int = field(default=0, metadata=bounds(0, 100_000_000))
    weight_decay: float = field(default=0.0, metadata=bounds(0, 1))
    clip: float = field(default=1.0, metadata=bounds(1e-6, 1e6))
    ema: float = field(default=0.95, metadata=bounds(0, 0.999999))
    seed: int = field(default=0, metadata=bounds(0, 2**63 - 1))
    size: int | None = field(default=None, metadata=bounds(64, 1536))
    flip: bool = False
    drop: float = field(default=0.0, metadata=bounds(0, 1))
    precision: str = field(default="fp32", metadata=choices("fp32", "fp16", "bf16"))
    teacher_precision: str = field(default="fp32", metadata=choices("fp32", "fp16", "bf16"))
    checkpointing: bool = False
    cache_gib: float = field(default=4.0, metadata=bounds(0, 1024))
    save_seconds: float = field(default=180.0, metadata=bounds(0, 1e6))
    validate_every: int = field(default=10, metadata=bounds(1, 1_000_000))
    prompts: tuple[str, ...] = field(default=(), metadata={"text": True})

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            check_prompt(prompt, "prompt of the validation")
        if self.w_min is not None and self.w_max is not None and self.w_min > self.w_max:
            raise ConfigError(f"w_min {self.w_min:g} is greater than w_max {self.w_max:g}")
        if self.form == FULL:
            given = [name for name in ("alpha", "lora_out") if getattr(self, name) is not None]
            if given:
                raise ConfigError(f"{given[0]} is of a LoRA, which the full form does not make; set form=lora")
        elif self.teacher is None and self.teacher_precision != "fp32":
            raise ConfigError(
                "teacher_precision: the teacher is the U-Net that is trained; name one with teacher=SOURCE"
            )

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: a model or teacher that cannot become an LCM, data that cannot be read."""
        looks = {pipeline.family.kind.denoiser: self._check_teacher, "data": self.pictures, "": self._check_place}
        return [*self._unfit(pipeline), *met((part, partial(look, pipeline)) for part, look in looks.items())]

    def outline(self, pipeline: Pipeline) -> Outline:
        """The shapes of the result in float32, and what is computed.

        A sample takes a forward and a backward pass of the student, one forward of the target and two of the teacher.
        """
        size = (self.pixels(pipeline) / pipeline.family.default_size) ** 2
        samples = self.steps * self.batch * self.accumulate * size
        made = self.student(converted(pipeline, "float32", (pipeline.family.kind.denoiser,)))
        own = (5 if self.checkpointing else 4) * samples
        calls = (Calls(made.denoiser, own), Calls(self.teacher_of(pipeline).denoiser, 2 * samples))
        return Outline(self._finished(made, pipeline), calls)

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the averaged weights, float32, or with the averaged LoRA added, and with the LCM sampler.

        The run lives in the job's folder as `lcm-` and a digest of options, teacher, student and data; a run that was
        stopped goes on from its last checkpoint, to the same bits.

        Raises:
            DivergedError: the loss is not finite; the last good checkpoint is kept.
            SourceError: a picture is damaged.
        """
        teacher, pictures = self.teacher_of(pipeline), self.pictures(pipeline)
        job.progress(pictures.told, 1, 1)
        digests = {"teacher_digest": teacher.denoiser.digest, "data_digest": pictures.digest}
        student = self.student(pipeline)
        folder = job.folder / f"lcm-{self._key(student, teacher, digests)}"
        if reached(folder / STATE) < self.steps:
            train_consistency(self, self._finished(student, pipeline), teacher, pictures, folder, job)
        entry = {**self._entry(pipeline, folder), **digests, "pictures": len(pictures)}
        return self._finished(self._trained(student, SafetensorsWeights(folder / STATE), entry), pipeline)

    @property
    def learning_rate(self) -> float:
        """`rate`, or the published one of the form."""
        return _RATES[self.form] if self.rate is None else self.rate

    def pixels(self, pipeline: Pipeline) -> int:
        """Side of the pictures that are trained on."""
        return self.size or pipeline.family.default_size

    def pictures(self, pipeline: Pipeline) -> PairedPictures:
        """Raises SourceError if the data cannot be used."""
        return PairedPictures.open(Path(self.data).expanduser(), self.pixels(pipeline))

    def teacher_of(self, pipeline: Pipeline) -> Pipeline:
        """The teacher, no tensor read yet: the model itself, unless one is named."""
        return pipeline if self.teacher is None else open_source(self.teacher)

    def guidances(self, teacher: Pipeline) -> tuple[float, float]:
        """(w_min, w_max), both guidance scales less one.

        Raises:
            ConfigError: one of them is not given, and what the teacher's own guidance puts in its place does not fit.
        """
        own = max(teacher.family.guidance_default - 1.0, 0.0)
        low = 0.75 * own if self.w_min is None else self.w_min
        high = 1.5 * own if self.w_max is None else self.w_max
        if low > high:
            raise ConfigError(f"w_min is {low:g} and w_max {high:g}; give both, the lesser one first")
        return low, high

    def times(self, pipeline: Pipeline) -> list[int]:
        """The timesteps that are trained, from the noisiest: those of `original_steps` steps of DDIM.

        Raises:
            ConfigError: the model has fewer timesteps.
        """
        config = {**lcm_scheduler(pipeline.scheduler), "original_inference_steps": self.original_steps}
        return [int(time) for time in make_sampler(config).timesteps(self.original_steps)]

    def span(self, pipeline: Pipeline) -> int:
        """How many timesteps one step of the teacher passes over."""
        return self.skip or trained_schedule(pipeline).num_train_timesteps // self.original_steps

    def student(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with the U-Net that is trained: of the full form one that takes guidance, too."""
        return embedded(pipeline) if self.form == FULL else pipeline

    def _finished(self, made: Pipeline, pipeline: Pipeline) -> Pipeline:
        """`made` with the LCM sampler; its guidance is 1, or the teacher's own as far as that was trained."""
        teacher = self.teacher_of(pipeline)
        low, high = self.guidances(teacher)
        own = float(np.clip(teacher.family.guidance_default, low + 1, high + 1))
        return as_lcm(made, _STEPS_DEFAULT, own if self.form == FULL else 1.0, self.original_steps)

    def _trained(self, student: Pipeline, state: SafetensorsWeights, entry: dict[str, Any]) -> Pipeline:
        unet = student.denoiser
        if self.form == FULL:
            return with_denoiser(student, unet.config, trained_weights(state, unet.weights.names()), entry)
        lora = lora_of(self, state)
        if self.lora_out is not None and first_process():
            dtype = PRECISIONS[self.lora_precision]
            write_lora(lora, Path(self.lora_out).expanduser(), dtype, str(student.source.get("id")))
        changed = replace(unet, weights=cast(with_deltas(unet.weights, lora.deltas()), "float32"))
        made = student.having(changed)
        return recorded(made, {**entry, "layers": len(lora.layers)})

    def _entry(self, pipeline: Pipeline, folder: Path) -> dict[str, Any]:
        curve = folder / "curve.jsonl"  # a crash of the machine may have emptied it; the weights are whole
        last: dict[str, Any] = next(reversed(read_curve(curve) if curve.is_file() else []), {})
        teacher = self.teacher_of(pipeline)
        low, high = self.guidances(teacher)
        unsaid = ("lora_out", "lora_precision", *(("rank", "alpha") if self.form == FULL else ()))
        said = {name: value for name, value in asdict(self).items() if name not in unsaid}
        said |= {"data": Path(self.data).name, "prompts": list(self.prompts), "rate": self.learning_rate}
        said |= {"w_min": low, "w_max": high, "teacher": str(teacher.source.get("id"))}
        return {"pass": self.kind, **said, "losses": {"loss": last["loss"]} if "loss" in last else {}}

    def _unfit(self, pipeline: Pipeline) -> Iterator[Problem]:
        family = pipeline.family
        if family.time_cond_dim:
            yield Problem(pipeline.family.kind.denoiser, "takes guidance as an embedding: it is an LCM already")
        elif pipeline.scheduler.get("_class_name") == "LCMScheduler":
            yield Problem(pipeline.family.kind.denoiser, "has the LCM sampler: it was made for a few steps already")
        yield from untrainable(pipeline, self.pixels(pipeline), self.batch, self.precision)

    def _check_teacher(self, pipeline: Pipeline) -> None:
        teacher = self.teacher_of(pipeline)
        self._require_prediction(pipeline)
        require_agreement(pipeline, teacher)
        self.guidances(teacher)

    def _require_prediction(self, pipeline: Pipeline) -> None:
        kind, alphas = pipeline.family.prediction_type, trained_schedule(pipeline).alphas_cumprod()
        if kind not in PREDICTIONS:
            raise UnsupportedError(
                f"predicts {kind}; an LCM is made of a model that predicts {' or '.join(PREDICTIONS)}"
            )
        if kind == "epsilon" and alphas[self.times(pipeline)[0]] <= 0:
            raise UnsupportedError("predicts epsilon with zero terminal SNR: no signal is left to find a picture in")

    def _check_place(self, pipeline: Pipeline) -> None:
        if self.lora_out is not None:
            require_lora_place(Path(self.lora_out).expanduser())

    def _key(self, student: Pipeline, teacher: Pipeline, digests: dict[str, str]) -> str:
        aside = ("data", "teacher", "lora_out", "lora_precision")
        return run_key(self, aside, self.pixels(student), student, teacher, digests)
