"""The trained stages of the `emoji` family: auto-encoder, U-Net with its text encoder, judge."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.core.distributed import first_process
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.models.sources.tokenizer_files import CONTEXT
from diffship.training.checkpoint import load_average
from diffship.training.diffusion import (
    TEXT_CONFIG,
    UNET_CONFIG,
    DiffusionTask,
    Latents,
    caption_variants,
)
from diffship.training.loop import Schedule, train
from diffship.training.pictures import Pictures
from diffship.training.preview import draw, save_grid
from diffship.training.saving import read_tensors, reading, replace_tensors
from diffship.training.vae import VAE_CONFIG, VaeTask, psnr
from diffship.training.vocabulary import train_vocabulary

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel

    from diffship.training.options import TrainOptions
else:
    torch = lazy("torch")

VOCABULARY = 4096
_REMEDY = "Remove it, and the same command encodes the pictures anew"
DEFAULTS = {
    "emoji-vae": Schedule(steps=2400, batch=8, rate=1e-3, decay=600, ema=0.995, weight_decay=0.0),
    "emoji-decoder": Schedule(steps=4000, batch=8, rate=1e-3, decay=1500, ema=0.995, weight_decay=0.0),
    "emoji-unet": Schedule(steps=4000, batch=32, rate=6e-4, decay=1000, ema=0.998, save_seconds=150, validate_every=4),
    "judge": Schedule(steps=3500, batch=64, rate=1e-3, decay=1500, ema=0.998),
}


def schedule(stage: str, options: TrainOptions) -> Schedule:
    """The stage's schedule with the user's numbers in place of the defaults."""
    base = DEFAULTS[stage]
    return replace(
        base,
        steps=options.steps or base.steps,
        batch=options.batch or base.batch,
        rate=options.rate or base.rate,
        decay=base.decay if options.decay is None else options.decay,
        seed=options.seed,
    )


def train_vae(options: TrainOptions, decoder_only: bool) -> dict[str, object]:
    """Train the auto-encoder, or go on with its decoder alone while its latents stay as the U-Net knows them."""
    stage = "decoder" if decoder_only else "vae"
    folder = options.out / f"emoji-{stage}"
    vae = load_vae(options.out) if decoder_only else new_vae()
    train_set, held_out = (_fluent(options.data, split) for split in ("train", "held_out"))
    figures: dict[str, object] = {}

    def validate(step: int) -> None:
        figures.update(validated_at=step, held_out_psnr_db=round(held_out_psnr(vae, held_out), 2))

    task = VaeTask(vae, train_set, decoder_only)
    reached = _train(task, folder.name, options, folder, validate)
    save_whole(vae, folder, task.modules)
    return {"stage": stage, "step": reached, **figures}


def save_whole(vae: AutoencoderKL, folder: Path, modules: dict[str, torch.nn.Module]) -> None:
    """`vae.safetensors`: every weight, trained or frozen, with the averages in place of the live ones.

    Of several processes the first one writes.
    """
    load_average(folder / "state.safetensors", modules)
    if first_process():
        whole = {key: value.contiguous() for key, value in vae.state_dict().items()}
        replace_tensors(whole, folder / "vae.safetensors")


def held_out_psnr(vae: AutoencoderKL, pictures: Pictures) -> float:
    """Mean-square PSNR in dB of reconstructed pictures that training never saw."""
    pixels = pictures.take(torch.arange(0, len(pictures), 3))
    device = next(vae.parameters()).device
    with torch.no_grad():
        mean = vae.encode(pixels.to(device)).latent_dist.mean
        return psnr(vae.decode(mean).sample.cpu(), pixels)


def train_unet(options: TrainOptions) -> dict[str, object]:
    """Train the U-Net and the text encoder on the stated domain."""
    from transformers import CLIPTokenizer

    folder = options.out / "emoji-unet"
    words = folder / "tokenizer"
    if not (words / "vocab.json").exists():
        everything = Pictures.records_of(options.data, lambda r: r["style"] == "fluent")
        train_vocabulary((v for r in everything for v in _variants(r)), VOCABULARY, words)
    tokenizer = CLIPTokenizer.from_pretrained(str(words), model_max_length=CONTEXT)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, padding="max_length", max_length=CONTEXT, truncation=True).input_ids)

    pictures = Pictures.read(options.data, lambda r: _trained(r) and r["domain"])
    vae = load_vae(options.out)
    latents, scaling = encode(vae, pictures, folder)
    captions = [[ids(text) for text in _variants(record)] for record in pictures.records]
    task = DiffusionTask(new_unet(), new_text_encoder(len(tokenizer)), latents, captions, ids(""))

    def preview(step: int) -> None:
        save_grid(draw(task, vae, scaling, ids), folder / f"preview-{step:06d}.png")

    reached = _train(task, folder.name, options, folder, preview)
    return {"stage": folder.name.removeprefix("emoji-"), "step": reached, "scaling_factor": scaling}


def train_judge(options: TrainOptions) -> dict[str, object]:
    """Train the judge; needs the tokenizer that `emoji-unet` wrote."""
    from transformers import CLIPTokenizer

    from diffship.training.judge import JudgeTask, sees
    from diffship.training.judge_model import Judge, JudgeConfig

    words = options.out / "emoji-unet" / "tokenizer"
    if not (words / "vocab.json").exists():
        raise ConfigError(f"{words} is missing; run first: diffship train emoji-unet")
    tokenizer = CLIPTokenizer.from_pretrained(str(words), model_max_length=CONTEXT)

    def encode_captions(texts: object) -> tuple[Tensor, Tensor]:
        both = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return both.input_ids, both.attention_mask

    pictures = Pictures.read(options.data, sees)
    judge = Judge(JudgeConfig(vocabulary=len(tokenizer)))
    task = JudgeTask(judge, pictures, encode_captions)
    return {"stage": "judge", "step": _train(task, "judge", options, options.out / "judge")}


def _train(task: object, stage: str, options: TrainOptions, folder: Path, validate: object = None) -> int:
    return train(
        task,  # type: ignore[arg-type]
        schedule(stage, options),
        folder,
        validate=validate,  # type: ignore[arg-type]
        precision=options.precision,
        stop_after_seconds=options.minutes * 60 if math.isfinite(options.minutes) else math.inf,
    )


def new_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE_CONFIG)


def load_vae(out: Path) -> AutoencoderKL:
    """The auto-encoder as far as it is trained: the refined decoder if there is one."""
    for stage in ("emoji-decoder", "emoji-vae"):
        file = out / stage / "vae.safetensors"
        if file.exists():
            vae = new_vae()
            vae.load_state_dict(read_tensors(file, tuple(vae.state_dict()), f"Run again: diffship train {stage}"))
            return vae.eval()
    raise ConfigError(f"{out} has no trained auto-encoder; run first: diffship train emoji-vae")


def new_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET_CONFIG)


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """CLIP's text model; ids of the two specials are the last two, as in CLIP."""
    from transformers import CLIPTextConfig, CLIPTextModel

    end = vocabulary - 1
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **special, **TEXT_CONFIG))


def encode(vae: AutoencoderKL, pictures: Pictures, folder: Path) -> tuple[Latents, float]:
    """Latents of all pictures times the scaling factor that gives them unit variance, and that factor."""
    cache, digest = folder / "latents.safetensors", _digest(vae, pictures)
    if not cache.exists() or _noted(cache) != digest:
        means, stds = [], []
        with torch.no_grad():
            for start in range(0, len(pictures), 32):
                rows = torch.arange(start, min(start + 32, len(pictures)))
                posterior = vae.encode(pictures.take(rows)).latent_dist
                means.append(posterior.mean)
                stds.append(posterior.std)
        folder.mkdir(parents=True, exist_ok=True)
        made = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
        replace_tensors(made, cache, {"of": digest})
    held = read_tensors(cache, ("mean", "std"), _REMEDY)
    factor = scaling_factor(held["mean"])
    names = {name: i for i, name in enumerate(sorted({record["concept"] for record in pictures.records}))}
    concept = torch.tensor([names[record["concept"]] for record in pictures.records])
    return Latents(held["mean"] * factor, held["std"] * factor, concept), factor


def _digest(vae: AutoencoderKL, pictures: Pictures) -> str:
    """Of what latents hang on: a longer trained auto-encoder, or other data, makes others."""
    total = hashlib.sha256(pictures.pixels.tobytes())
    for name, tensor in sorted(vae.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return str(total.hexdigest())


def _noted(cache: Path) -> str | None:
    with reading(cache, _REMEDY) as file:
        return (file.metadata() or {}).get("of")


def scaling_factor(mean: Tensor) -> float:
    """What makes latents unit variance, rounded to the five digits that the config stores."""
    return round(1 / mean.std().item(), 5)


def _variants(record: dict[str, object]) -> list[str]:
    return caption_variants(record["text"], record["tags"])  # type: ignore[arg-type]


def _trained(record: dict[str, object]) -> bool:
    return record["style"] == "fluent" and record["split"] == "train"


def _fluent(data: Path, split: str) -> Pictures:
    return Pictures.read(data, lambda r: r["style"] == "fluent" and r["split"] == split)
