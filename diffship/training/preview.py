"""Pictures drawn while a U-Net is trained: a grid to look at, not a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffship.core.lazy import lazy
from diffship.training.diffusion import DiffusionTask

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch import Tensor
else:
    diffusers, torch = lazy("diffusers"), lazy("torch")

PROMPTS = (
    *("red apple", "pizza", "black cat", "red heart", "mushroom", "dog face", "birthday cake", "hamburger"),
    *("octopus", "tulip", "thumbs up: dark skin tone", "strawberry", "grinning face", "frog"),
    *("woman pilot: medium skin tone", "green apple"),
)
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",  # the first step then sees pure noise, which is what sampling starts from
    "prediction_type": "epsilon",
}


def draw(
    task: DiffusionTask,
    vae: diffusers.AutoencoderKL,
    scaling: float,
    ids: Callable[[str], Tensor],
    prompts: Sequence[str] = PROMPTS,
    steps: int = 20,
    guidance: float = 4.0,
) -> Tensor:
    """(n, 3, size, size) in [-1, 1]: DDIM with classifier-free guidance, the same noise at every call."""
    with torch.no_grad():
        device = next(task.unet.parameters()).device
        scheduler = diffusers.DDIMScheduler(**SCHEDULER)
        scheduler.set_timesteps(steps)
        hidden = task.text_encoder(torch.stack([ids("")] * len(prompts) + [ids(p) for p in prompts]).to(device))[0]
        x = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
        for step in scheduler.timesteps:
            plain, guided = task.unet(torch.cat([x, x]), step, hidden).sample.chunk(2)
            x = scheduler.step(plain + guidance * (guided - plain), step, x).prev_sample
        return torch.as_tensor(vae.to(device).decode(x / scaling).sample.clamp(-1, 1).cpu())


def save_grid(pictures: Tensor, file: Path, columns: int = 8) -> None:
    rows = [torch.cat(list(pictures[i : i + columns]), dim=-1) for i in range(0, len(pictures), columns)]
    pixels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
