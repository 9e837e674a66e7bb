"""Train the KL auto-encoder of `emoji`: L1 at three scales, L1 of the gradients, and a KL term of small weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffship.core.lazy import lazy
from diffship.training.pictures import Pictures

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 128,
}


class VaeTask:
    """Reconstruct pictures; half of each batch comes from the stated domain.

    `decoder_only` freezes the encoder, so that latents that a U-Net already knows stay what they are.
    """

    def __init__(self, vae: AutoencoderKL, pictures: Pictures, decoder_only: bool = False) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)
        self.vae.encoder.requires_grad_(not decoder_only)
        self.vae.quant_conv.requires_grad_(not decoder_only)
        self.modules = {"vae": self.vae}
        self.pictures = pictures
        self.domain = torch.tensor([i for i, record in enumerate(pictures.records) if record["domain"]])

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pixels = augment(self.pictures.take(self._rows(batch, generator)), generator)
        pixels = pixels.to(next(self.vae.parameters()).device, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        shape, edges = multiscale_l1(decoded, pixels), gradient_l1(decoded, pixels)
        loss = shape + edges + 1e-6 * posterior.kl().mean()
        return loss, {"l1": shape.item(), "edges": edges.item(), "psnr": psnr(decoded, pixels)}

    def _rows(self, batch: int, generator: torch.Generator) -> Tensor:
        half = batch // 2
        inside = self.domain[torch.randint(len(self.domain), (half,), generator=generator)]
        return torch.cat([inside, torch.randint(len(self.pictures), (batch - half,), generator=generator)])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror at random, and shift by up to 8 px over a white ground."""
    for i in range(len(pixels)):
        if torch.rand((), generator=generator) < 0.5:
            pixels[i] = pixels[i].flip(-1)
        shift = torch.randint(-8, 9, (2,), generator=generator)
        pixels[i] = _shifted(pixels[i], int(shift[0]), int(shift[1]))
    return pixels


def _shifted(picture: Tensor, down: int, right: int) -> Tensor:
    moved = torch.ones_like(picture)
    height, width = picture.shape[-2:]
    moved[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = picture[
        :, max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return moved


def multiscale_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference at full, half and quarter size."""
    total = (a - b).abs().mean()
    for scale in (2, 4):
        total = total + (F.avg_pool2d(a, scale) - F.avg_pool2d(b, scale)).abs().mean()
    return total


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical differences: keeps edges sharp."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = (a.detach().clamp(-1, 1) - b).square().mean().item()
    return 10 * torch.log10(torch.tensor(4 / max(error, 1e-12))).item()


def enlarge(pixels: Tensor, size: int) -> Tensor:
    return F.interpolate(pixels, size=(size, size), mode="nearest")
