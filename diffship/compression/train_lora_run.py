"""One run of the train-lora pass: what it is told, parts loaded, pictures encoded, the loop started in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.compression.runs import MIXED, require_one_folder, require_room, spread_captions, trainable
from diffship.compression.trained import MIN_SNR, trained_schedule
from diffship.compression.trained_lora import alpha_of
from diffship.compression.unet_run import fit
from diffship.core.job import Job
from diffship.core.lazy import lazy
from diffship.core.strict import bounded, bounds, choices
from diffship.models.pipeline import Pipeline
from diffship.sampling.tokenizer import check_prompt
from diffship.training.adapters import ATTENTION, TARGETS, add_lora
from diffship.training.distillation import DistillationTask, Draws, Forward, Losses
from diffship.training.distillation_data import Captions, make_latents
from diffship.training.distillation_report import Look
from diffship.training.loop import new_accelerator
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

LAYERS = {"attention": ATTENTION, "all": TARGETS}


@dataclass(frozen=True)
@bounded
class TrainLoraOptions:
    """What the training of a LoRA is told.

    data: folder of captioned pictures (`training.paired`), of the style or the thing that is to be learnt. rank, alpha:
    of the LoRA; alpha is the rank if none is given. targets: `attention` (queries, keys, values and outputs of all
    attention layers) or `all` (also convolutions, feed-forward and projection layers, as LCM-LoRA).
    lora_out: folder for the LoRA in three forms: diffusers', peft's and kohya's. lora_precision: of these files.
    steps, batch, accumulate: each step's gradient is the mean over `accumulate` batches of `batch` samples, of all
    processes together. rate, warmup, decay: learning rate of AdamW; it rises over `warmup` steps and falls to zero over
    the last `decay`. weight_decay, clip: AdamW's decay, and the greatest norm of a gradient. ema: decay of the averaged
    weights, which are the result; 0 takes the live ones. seed: of everything that is drawn.
    size: pixels of a side, by default the model's own. flip: mirror every other picture. drop: share of captions that
    are dropped, so that the LoRA also learns pictures without a caption, which guidance asks for. weighting: `none`, or
    `min-snr-5-capped` as the emoji family was trained (noise prediction only).
    precision: fp32, or mixed with fp16 or bf16. checkpointing: compute activations twice instead of keeping them.
    cache_gib: encoded pictures are kept in the job's folder if they take no more than this; else they are encoded at
    every step.
    save_seconds: between checkpoints. validate_every, prompts: pictures of `prompts` (by default eight captions) are
    drawn at every so many checkpoints.
    """

    data: str
    rank: int = field(default=4, metadata=bounds(1, 1024))
    alpha: float | None = field(default=None, metadata=bounds(1e-3, 1e6))
    targets: str = field(default="attention", metadata=choices(*LAYERS))
    lora_out: str | None = field(default=None, metadata={"output": True})
    lora_precision: str = field(default="fp32", metadata=choices("fp32", "fp16"))
    steps: int = field(default=15_000, metadata=bounds(1, 100_000_000))
    batch: int = field(default=4, metadata=bounds(1, 65_536))
    accumulate: int = field(default=1, metadata=bounds(1, 65_536))
    rate: float = field(default=1e-4, metadata=bounds(1e-12, 1))
    warmup: int = field(default=0, metadata=bounds(0, 100_000_000))
    decay: int = field(default=0, metadata=bounds(0, 100_000_000))
    weight_decay: float = field(default=1e-2, metadata=bounds(0, 1))
    clip: float = field(default=1.0, metadata=bounds(1e-6, 1e6))
    ema: float = field(default=0.0, metadata=bounds(0, 0.999999))
    seed: int = field(default=0, metadata=bounds(0, 2**63 - 1))
    size: int | None = field(default=None, metadata=bounds(64, 1536))
    flip: bool = False
    drop: float = field(default=0.0, metadata=bounds(0, 1))
    weighting: str = field(default="none", metadata=choices("none", MIN_SNR))
    precision: str = field(default="fp32", metadata=choices("fp32", "fp16", "bf16"))
    checkpointing: bool = False
    cache_gib: float = field(default=4.0, metadata=bounds(0, 1024))
    save_seconds: float = field(default=180.0, metadata=bounds(0, 1e6))
    validate_every: int = field(default=10, metadata=bounds(1, 1_000_000))
    prompts: tuple[str, ...] = field(default=(), metadata={"text": True})

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            check_prompt(prompt, "prompt of the validation")


def train_lora(options: TrainLoraOptions, pipeline: Pipeline, pictures: PairedPictures, folder: Path, job: Job) -> None:
    """Train until `options.steps`, from the checkpoint in `folder` if there is one.

    Writes `state.safetensors`, `curve.jsonl`, `curve.png` and `validation-STEP.png`. Raises as `training.loop.train`.
    """
    accelerator = new_accelerator(MIXED[options.precision])
    require_one_folder(folder, accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    task = make_task(options, pipeline, pictures, job, device, main)
    require_room(folder, trainable(task.student), "the checkpoint of the LoRA")
    look = Look(options.prompts or spread_captions(pictures), pictures.size)
    fit(task, options, options.rate, pipeline, look, folder, job, "train-lora", device)


def make_task(
    options: TrainLoraOptions, pipeline: Pipeline, pictures: PairedPictures, job: Job, device: torch.device, main: bool
) -> DistillationTask:
    """The task with everything that it needs on `device`: the loss of plain training alone, and no teacher."""
    family = pipeline.family
    side = pictures.size // family.vae_factor
    alphas = trained_schedule(pipeline).alphas_cumprod()
    shape = (family.latent_channels, side, side)
    return DistillationTask(
        _trainable(options, pipeline, device),
        None,
        (),
        Draws(pictures, range(len(alphas)), shape, options.drop, options.flip),
        make_latents(pipeline, pictures, options.flip, options.cache_gib, job, device, main),
        Captions(pipeline, pictures.size, device),
        Forward(torch.tensor(alphas), family.prediction_type),
        Losses(task=1.0, out=0.0, feat=0.0, min_snr=options.weighting != "none"),
        pipeline.denoiser.name,
    )


def _trainable(options: TrainLoraOptions, pipeline: Pipeline, device: torch.device) -> nn.Module:
    module = pipeline.denoiser.module(str(device))
    inner = module.get_submodule("inner")
    add_lora(inner, options.rank, alpha_of(options), options.seed, LAYERS[options.targets])
    if options.checkpointing:
        inner.enable_gradient_checkpointing()  # type: ignore[operator]
    return module
