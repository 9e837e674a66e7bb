"""Train a latent diffusion U-Net together with its text encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy
from diffship.core.registry import kind
from diffship.sampling.process import cumulative

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import Tensor
    from torch.nn import functional as F
    from transformers import CLIPTextModel
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (4, 6, 8, 8),  # diffusers' old name: these are head counts, so heads are 16 wide
    "cross_attention_dim": 192,
}
TEXT_CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 77,
    "projection_dim": 192,
    "hidden_act": "quick_gelu",
}
BETAS = (0.00085, 0.012)
TRAIN_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's `scaled_linear` schedule: (1000,) float32."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def loss_weight(snr: Tensor) -> Tensor:
    """Weight of the squared noise error at a signal-to-noise ratio.

    min-SNR-5 (Hang et al. 2023, eq. 8) keeps nearly clean steps from dominating; the second term is the weight of the
    picture's error, capped, so that the noisiest steps, where colour and shape are decided, are learnt at all.
    """
    return snr.clamp(max=5.0) / snr + (1 / snr).clamp(max=10.0)


@dataclass(frozen=True)
class Latents:
    """Encoded pictures: `mean` and `std` (n, 4, h, w) float32, already times the scaling factor; `concept` (n,)."""

    mean: Tensor
    std: Tensor
    concept: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows drawn by concept, not by picture, and a sample of each posterior."""
        count = int(self.concept.max()) + 1
        wanted = torch.randint(count, (batch,), generator=generator)
        keys = torch.rand(len(self.concept), generator=generator)
        rows = torch.stack([torch.where(self.concept == c, keys, -1.0).argmax() for c in wanted])
        noise = torch.randn(self.mean[rows].shape, generator=generator)
        return rows, self.mean[rows] + self.std[rows] * noise


def emoji_modules(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> dict[str, Any]:
    """What is trained, by the names that checkpoints have for it: those of the parts of its kind of model."""
    of = kind("sd")
    return {of.denoiser: unet, of.text_parts[0]: text_encoder}


class DiffusionTask:
    """Predict the noise (epsilon); captions are dropped for classifier-free guidance at `drop`."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        latents: Latents,
        captions: Sequence[Sequence[Tensor]],
        empty: Tensor,
        drop: float = 0.1,
    ) -> None:
        self.unet = unet.to(memory_format=torch.channels_last)
        self.text_encoder = text_encoder
        self.modules = emoji_modules(self.unet, text_encoder)
        self.latents, self.captions, self.empty, self.drop = latents, captions, empty, drop
        self.alphas = alphas_cumprod()

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows, clean = self.latents.draw(batch, generator)
        ids = torch.stack([self._caption(int(row), generator) for row in rows])
        steps = torch.randint(TRAIN_STEPS, (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        alpha = self.alphas[steps][:, None, None, None]
        noisy = cumulative(alpha).mix(clean, noise)
        device = next(self.unet.parameters()).device
        hidden = self.text_encoder(ids.to(device))[0]
        noisy = noisy.to(device, memory_format=torch.channels_last)
        predicted = self.unet(noisy, steps.to(device), hidden, return_dict=False)[0].float()
        errors = F.mse_loss(predicted, noise.to(device), reduction="none").mean((1, 2, 3))
        alpha = alpha.flatten().to(device)
        loss = (loss_weight(alpha / (1 - alpha)) * errors).mean()
        return loss, {"mse": errors.mean().item()}

    def _caption(self, row: int, generator: torch.Generator) -> Tensor:
        if torch.rand((), generator=generator) < self.drop:
            return self.empty
        choices = self.captions[row]
        # The plain caption half of the time, one of its variants otherwise.
        pick = torch.randint(-len(choices) + 1, len(choices), (), generator=generator)
        return choices[max(0, int(pick))]


def caption_variants(text: str, tags: Sequence[str]) -> list[str]:
    """Ways to ask for a picture: the caption first, then with an article, then with tags."""
    article = "an" if text[:1] in "aeiou" else "a"
    variants = [text, f"{article} {text}"]
    if tags:
        variants.append(f"{text}, {', '.join(tags[:3])}")
        variants.append(f"{text}, {tags[math.floor(len(tags) / 2)]}")
    return variants
