"""Gather a trained `emoji` into a diffusers folder with fp16 weights, its tokenizer and its judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.sampling.tokenizer import END, START
from diffship.training.checkpoint import load_average
from diffship.training.diffusion import emoji_modules
from diffship.training.emoji_stages import load_vae, new_text_encoder, new_unet, scaling_factor
from diffship.training.emoji_unpack import steps_before
from diffship.training.judge_model import Judge, JudgeConfig, save_judge
from diffship.training.preview import SCHEDULER

if TYPE_CHECKING:
    import torch
    from safetensors import torch as tensor_file

    from diffship.training.options import TrainOptions
else:
    torch, tensor_file = lazy("torch"), lazy("safetensors.torch")

CLASSES = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
DEFAULTS = {"guidance_default": 4.0, "steps_default": 25}
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": START,
    "eos_token": END,
    "pad_token": END,
    "unk_token": END,
    "add_prefix_space": False,
    "errors": "replace",
}


def pack(options: TrainOptions) -> dict[str, object]:
    """Write the family into the folder `options.out` from the runs in `options.data`.

    Weights are the averages, as fp16 safetensors under classic (hub) names; nothing is pickled.
    """
    folder, runs = options.out, options.data
    unet_run = runs / "emoji-unet"
    if not (unet_run / "state.safetensors").exists():
        raise ConfigError(f"{unet_run} holds no checkpoint; run first: diffship train emoji-unet")
    if not (unet_run / "latents.safetensors").exists():
        raise ConfigError(
            f"{unet_run} has no latents, which say how they are scaled; run first: diffship train emoji-unet"
        )
    words = json.loads((unet_run / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    unet, text_encoder = new_unet(), new_text_encoder(len(words))
    step = load_average(unet_run / "state.safetensors", emoji_modules(unet, text_encoder))
    vae = load_vae(runs)
    scaling = scaling_factor(tensor_file.load_file(unet_run / "latents.safetensors")["mean"])
    vae.register_to_config(scaling_factor=scaling, force_upcast=False)
    steps = step + steps_before(unet_run)
    _module(folder / "unet", unet, "diffusion_pytorch_model", steps=steps)
    _module(folder / "vae", vae, "diffusion_pytorch_model")
    _module(folder / "text_encoder", text_encoder, "model", classic=True)
    _tokenizer(unet_run / "tokenizer", folder / "tokenizer", len(words))
    _json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **SCHEDULER})
    _json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", "_diffship": DEFAULTS, **CLASSES})
    packed: dict[str, object] = {"unet_steps": steps, "scaling_factor": scaling, "folder": str(folder)}
    if (runs / "judge" / "state.safetensors").exists():
        judge = Judge(JudgeConfig(vocabulary=len(words)))
        packed["judge_steps"] = load_average(runs / "judge" / "state.safetensors", {"judge": judge})
        save_judge(judge, folder / "judge")
    return packed


def _module(folder: Path, module: Any, name: str, classic: bool = False, steps: int | None = None) -> None:
    """Config and weights; transformers 5 drops the `text_model.` prefix that every hub checkpoint has: put it back."""
    folder.mkdir(parents=True, exist_ok=True)
    if classic:
        # Without this, transformers 5 opens fp16 files as fp16 and a stock pipeline mixes dtypes.
        module.config.dtype = torch.float32
        module.config.save_pretrained(folder)
    else:
        module.save_config(folder)
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    if classic:
        tensors = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in tensors.items()}
    facts = {"format": "pt"} if steps is None else {"format": "pt", "steps": str(steps)}
    tensor_file.save_file(tensors, folder / f"{name}.safetensors", facts)


def _tokenizer(source: Path, folder: Path, vocabulary: int) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(source), model_max_length=77)
    if len(tokenizer) != vocabulary:
        raise ConfigError(f"{source}: {vocabulary} ids in vocab.json, {len(tokenizer)} in the tokenizer")
    tokenizer.save_pretrained(str(folder))
    _json(folder / "tokenizer_config.json", {**TOKENIZER, "model_max_length": tokenizer.model_max_length})
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())


def _json(file: Path, content: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
