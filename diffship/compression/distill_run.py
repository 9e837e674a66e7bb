"""One run of the distill pass: what it is told, parts loaded, pictures encoded, the loop started in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.compression.runs import MIXED, require_one_folder, require_room, spread_captions
from diffship.compression.trained import MIN_SNR, trained_schedule
from diffship.compression.unet_run import fit
from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.lazy import lazy
from diffship.core.precision import precision_of
from diffship.core.strict import bounded, bounds, choices
from diffship.models.pipeline import Pipeline
from diffship.sampling.samplers import make_sampler
from diffship.sampling.tokenizer import check_prompt
from diffship.training.distillation import DistillationTask, Draws, Forward, Losses
from diffship.training.distillation_data import Captions, make_latents
from diffship.training.distillation_pairs import KINDS, Pair, feature_pairs
from diffship.training.distillation_report import Look
from diffship.training.loop import new_accelerator
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


@dataclass(frozen=True)
@bounded
class DistillOptions:
    """What a distillation is told.

    data: folder of captioned pictures (`training.paired`). teacher: source of the teacher, by default the model as it
    was before all passes. features: `blocks` (outputs of down and up blocks: BK-SDM, Hybrid SD), `self-attention`
    (KOALA) or `none`. w_task, w_out, w_feat: weights of the error against the noise (or v) that was added, against the
    teacher's output and of the features.
    steps, batch, accumulate: each step's gradient is the mean over `accumulate` batches of `batch` samples, of all
    processes together. rate, warmup, decay: learning rate of AdamW; it rises over `warmup` steps and falls to zero over
    the last `decay`. weight_decay, clip: AdamW's decay, and the greatest norm of a gradient. ema: decay of the averaged
    weights, which are the result; 0 takes the live ones. seed: of everything that is drawn.
    size: pixels of a side, by default the model's own. flip: mirror every other picture. drop: share of captions that
    are dropped, for guidance. weighting: `none`, or `min-snr-5-capped` as the emoji family was trained (noise
    prediction only).
    teacher_steps: of a step-distilled teacher the number of its steps; only their timesteps are trained (trailing
    spacing), and w_task must be 0, as such a teacher does not predict the noise that was added. 0 for other teachers.
    precision: fp32, or mixed with fp16 or bf16. teacher_precision: of the teacher's weights. checkpointing: compute
    activations twice instead of keeping them. cache_gib: encoded pictures are kept in the job's folder if they take no
    more than this; else they are encoded at every step.
    save_seconds: between checkpoints. validate_every, prompts: pictures of `prompts` (by default eight captions) are
    drawn at every so many checkpoints.
    """

    data: str
    teacher: str | None = None
    features: str = field(default="blocks", metadata=choices(*KINDS))
    w_task: float = field(default=1.0, metadata=bounds(0, 1e6))
    w_out: float = field(default=1.0, metadata=bounds(0, 1e6))
    w_feat: float = field(default=1.0, metadata=bounds(0, 1e6))
    steps: int = field(default=50_000, metadata=bounds(1, 100_000_000))
    batch: int = field(default=16, metadata=bounds(1, 65_536))
    accumulate: int = field(default=4, metadata=bounds(1, 65_536))
    rate: float = field(default=5e-5, metadata=bounds(1e-12, 1))
    warmup: int = field(default=0, metadata=bounds(0, 100_000_000))
    decay: int = field(default=0, metadata=bounds(0, 100_000_000))
    weight_decay: float = field(default=1e-2, metadata=bounds(0, 1))
    clip: float = field(default=1.0, metadata=bounds(1e-6, 1e6))
    ema: float = field(default=0.999, metadata=bounds(0, 0.999999))
    seed: int = field(default=0, metadata=bounds(0, 2**63 - 1))
    size: int | None = field(default=None, metadata=bounds(64, 1536))
    flip: bool = False
    drop: float = field(default=0.1, metadata=bounds(0, 1))
    weighting: str = field(default="none", metadata=choices("none", MIN_SNR))
    teacher_steps: int = field(default=0, metadata=bounds(0, 150))
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
        if not (self.w_task or self.w_out or (self.w_feat and self.features != "none")):
            raise ConfigError("all losses have weight 0; set one of w_task, w_out and w_feat (with features)")
        if self.teacher_steps and self.w_task:
            raise ConfigError(
                f"teacher_steps={self.teacher_steps} with w_task={self.w_task:g}: a step-distilled teacher does not "
                "predict the noise that was added; set w_task=0"
            )

    def timesteps(self, teacher: Pipeline) -> list[int]:
        """Those that are trained: all, or those of a step-distilled teacher's own schedule."""
        if not self.teacher_steps:
            return list(range(trained_schedule(teacher).num_train_timesteps))
        trailing = make_sampler({**teacher.scheduler, "timestep_spacing": "trailing"})
        # some samplers call the model twice at one timestep
        return list(dict.fromkeys(round(time) for time in trailing.timesteps(self.teacher_steps).tolist()))


def train_student(
    options: DistillOptions, pipeline: Pipeline, teacher: Pipeline, pictures: PairedPictures, folder: Path, job: Job
) -> None:
    """Train until `options.steps`, from the checkpoint in `folder` if there is one.

    Writes `state.safetensors`, `curve.jsonl`, `curve.png`, `pairs.json` and `validation-STEP.png`. Raises as
    `training.loop.train`.
    """
    accelerator = new_accelerator(MIXED[options.precision])
    require_one_folder(folder, accelerator)
    pairs = feature_pairs(options.features, pipeline.denoiser, teacher.denoiser)
    require_room(folder, pipeline.denoiser.parameters, "the checkpoint of the distillation")
    device, main = accelerator.device, accelerator.is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "pairs.json", json.dumps([asdict(pair) for pair in pairs], indent=1) + "\n")
    task = make_task(options, pipeline, teacher, pictures, pairs, job, device, main)
    look = Look(options.prompts or spread_captions(pictures), pictures.size)
    if options.teacher_steps:  # a few-step teacher has its guidance in its weights
        look = replace(look, steps=(options.teacher_steps,), guidance=1.0)
    fit(task, options, options.rate, pipeline, look, folder, job, "distill", device)


def make_task(
    options: DistillOptions,
    pipeline: Pipeline,
    teacher: Pipeline,
    pictures: PairedPictures,
    pairs: tuple[Pair, ...],
    job: Job,
    device: torch.device,
    main: bool,
) -> DistillationTask:
    """The task with everything that it needs on `device`; the student in float32."""
    student = pipeline.denoiser.module(str(device)).requires_grad_(True)
    if options.checkpointing:
        student.get_submodule("inner").enable_gradient_checkpointing()  # type: ignore[operator]
    side = pictures.size // pipeline.family.vae_factor
    shape = (pipeline.family.latent_channels, side, side)
    return DistillationTask(
        student,
        teacher.denoiser.module(str(device), precision_of(options.teacher_precision).activations),
        pairs,
        Draws(pictures, options.timesteps(teacher), shape, options.drop, options.flip),
        make_latents(pipeline, pictures, options.flip, options.cache_gib, job, device, main),
        Captions(pipeline, pictures.size, device),
        Forward(torch.tensor(trained_schedule(pipeline).alphas_cumprod()), pipeline.family.prediction_type),
        Losses(options.w_task, options.w_out, options.w_feat, options.weighting != "none"),
        pipeline.denoiser.name,
    )
