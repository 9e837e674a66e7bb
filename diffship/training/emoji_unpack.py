"""The way back from a packed `emoji` to runs: training goes on from the weights that the package ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.registry import kind
from diffship.training.checkpoint import save_start
from diffship.training.diffusion import emoji_modules
from diffship.training.emoji_stages import new_text_encoder, new_unet
from diffship.training.judge_model import load_judge

if TYPE_CHECKING:
    import torch
    from safetensors import torch as tensor_file

    from diffship.training.options import TrainOptions
else:
    tensor_file = lazy("safetensors.torch")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def unpack(options: TrainOptions) -> dict[str, object]:
    """Make runs in `options.out` that start from the packed family in `options.data`.

    Averages and live weights start equal, moments and the step count at zero, so that the rate warms up again.

    Raises:
        ConfigError: there is no packed family, or the runs exist.
    """
    packed, runs = options.data, options.out
    if not (_unet_file(packed)).exists():
        raise ConfigError(f"{packed} is not a packed family; the package has one in diffship/models/emoji")
    run = runs / "emoji-unet"
    if (run / "state.safetensors").exists():
        raise ConfigError(f"{run} has a checkpoint already; remove it first, or go on with: diffship train emoji-unet")
    shutil.copytree(packed / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    (runs / "emoji-vae").mkdir(exist_ok=True)
    tensor_file.save_file(_float32(packed / "vae" / WEIGHTS), runs / "emoji-vae" / "vae.safetensors")
    words = json.loads((packed / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    unet, text_encoder = new_unet(), new_text_encoder(len(words))
    unet.load_state_dict(_float32(_unet_file(packed)))
    text_encoder.load_state_dict(
        _named_for(text_encoder, _float32(packed / kind("sd").text_parts[0] / "model.safetensors"))
    )
    save_start(run / "state.safetensors", emoji_modules(unet, text_encoder))
    if (packed / "judge").is_dir():
        save_start(runs / "judge" / "state.safetensors", {"judge": load_judge(packed / "judge").requires_grad_(True)})
    steps = trained_steps(packed)
    (run / "before.json").write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")
    return {"unet_steps": steps, "runs": str(runs)}


def trained_steps(packed: Path) -> int:
    """Steps that made the U-Net of a packed family, from its file's metadata; 0 if they are not stated."""
    with safe_open(_unet_file(packed), "pt") as file:
        return int((file.metadata() or {}).get("steps", 0))


def _unet_file(packed: Path) -> Path:
    return packed / kind("sd").denoiser / WEIGHTS


def steps_before(run: Path) -> int:
    """Steps of earlier runs, which `unpack` noted."""
    note = run / "before.json"
    return int(json.loads(note.read_text(encoding="utf-8"))["steps"]) if note.exists() else 0


def _float32(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in tensor_file.load_file(file).items()}


def _named_for(module: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 has no `text_model.` in front of its names, 4 has."""
    if any(name.startswith("text_model.") for name in module.state_dict()):
        return tensors
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
