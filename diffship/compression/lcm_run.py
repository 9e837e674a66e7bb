"""One run of the lcm pass: what it is told, parts loaded, pictures encoded, the loop started in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffship.compression.runs import MIXED, require_one_folder, require_room, spread_captions, trainable
from diffship.compression.trained import trained_schedule
from diffship.compression.trained_lora import alpha_of
from diffship.compression.unet_run import fit
from diffship.core.dtype import TensorMeta
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.lazy import lazy
from diffship.core.precision import precision_of
from diffship.core.strict import bounded, bounds, choices
from diffship.core.weights import Derived, Weights
from diffship.models.assemble import with_denoiser
from diffship.models.pipeline import Pipeline
from diffship.models.sources.arch_configs import lcm_scheduler
from diffship.sampling.samplers import make_sampler
from diffship.sampling.tokenizer import check_prompt
from diffship.training.adapters import add_lora
from diffship.training.consistency import LOSSES, Consistency, Diffusion
from diffship.training.consistency_task import ConsistencyTask, GuidedDraws
from diffship.training.distillation import Draws
from diffship.training.distillation_data import Captions, make_latents
from diffship.training.distillation_report import Look
from diffship.training.loop import new_accelerator
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

FULL, LORA = "full", "lora"
_RATES = {FULL: 1e-6, LORA: 1e-4}  # those of diffusers' training scripts
LOOKS = (1, 2, 4, 8)  # steps of the pictures that are looked at
WIDTH = 256  # of the guidance embedding, as published
_PROJECTION = "time_embedding.cond_proj.weight"


@dataclass(frozen=True)
@bounded
class LcmOptions:
    """What a consistency distillation is told.

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

    @property
    def learning_rate(self) -> float:
        """`rate`, or the published one of the form."""
        return _RATES[self.form] if self.rate is None else self.rate

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


def train_consistency(
    options: LcmOptions, student: Pipeline, teacher: Pipeline, pictures: PairedPictures, folder: Path, job: Job
) -> None:
    """Train until `options.steps`, from the checkpoint in `folder` if there is one.

    `student` has the LCM sampler already. Writes `state.safetensors`, `curve.jsonl`, `curve.png` and
    `validation-STEP.png`. Raises as `training.loop.train`.
    """
    accelerator = new_accelerator(MIXED[options.precision])
    require_one_folder(folder, accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    task = make_task(options, student, teacher, pictures, job, device, main)
    require_room(folder, trainable(task.student), "the checkpoint of the distillation")
    look = Look(options.prompts or spread_captions(pictures), pictures.size, LOOKS)
    fit(task, options, options.learning_rate, student, look, folder, job, "lcm", device, task.follow)


def make_task(
    options: LcmOptions,
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


def _trainable(options: LcmOptions, student: Pipeline, device: torch.device) -> nn.Module:
    module = student.denoiser.module(str(device))
    inner = module.get_submodule("inner")
    if student.family.time_cond_dim is None:
        add_lora(inner, options.rank, alpha_of(options), options.seed)
    else:
        inner.requires_grad_(True)
    if options.checkpointing:
        inner.enable_gradient_checkpointing()  # type: ignore[operator]
    return module


def _frozen(options: LcmOptions, teacher: Pipeline, device: torch.device) -> nn.Module | None:
    if options.form == LORA and options.teacher is None:
        return None
    return teacher.denoiser.module(str(device), precision_of(options.teacher_precision).activations)


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
