"""The adversarial phase of a decoder's training: discriminator, hinge losses, adaptive weight and augmentations.

VQGAN (Esser et al., arXiv 2012.09841) has the losses and the weight, DiffAugment (Zhao et al., arXiv 2006.10738) the
augmentations, pix2pix (Isola et al., arXiv 1611.07004) the discriminator of patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy, lazy_base

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import Module
    from torch.nn import functional as F
else:
    torch, nn, F = lazy("torch"), lazy("torch.nn"), lazy("torch.nn.functional")
    Module = lazy_base("torch.nn", "Module")

MOST_WEIGHT = 1e4
_SHIFT, _CUT = 0.125, 0.2  # of a side: how far pictures are moved, and the square that is taken out
_GROUPS = 8


class Discriminator(Module):
    """(n, 3, h, w) in [-1, 1] -> (n, 1, h / 8 - 2, w / 8 - 2): a number for each patch of 70 pixels, high for real.

    Group norms stand where the published one has batch norms: every picture is judged alone, and there is no state
    beside the weights. They are drawn from `seed`.
    """

    def __init__(self, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        layers: list[Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [nn.Conv2d(before * width, after * width, 4, stride, 1, bias=False)]
            layers += [nn.GroupNorm(_GROUPS, after * width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(pictures))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """The weight at which both losses pull the decoder's last layer equally hard: |dr/dw| / (|da/dw| + 1e-4).

    At most 1e4, without a gradient of its own. The graph stays, for the backward pass that follows.
    """
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return torch.as_tensor((pulls[0] / (pulls[1] + 1e-4)).clamp(0, MOST_WEIGHT).detach())


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] as the discriminator sees them, each drawn apart; a gradient passes through.

    Brightness moves by up to 0.5, saturation is scaled by 0 to 2 and contrast by 0.5 to 1.5; then the picture moves by
    up to an eighth of a side, and a square of a fifth of a side is taken out. What is not there is 0.
    """
    count = len(pictures)

    def uniform() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator).to(pictures.device)

    x = pictures + (uniform() - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * uniform()) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (uniform() + 0.5) + mean
    return torch.stack([_cut(_moved(picture, generator), generator) for picture in x])


def _moved(picture: Tensor, generator: torch.Generator) -> Tensor:
    height, width = picture.shape[-2:]
    most = [int(side * _SHIFT + 0.5) for side in (height, width)]
    down, right = (int(torch.randint(2 * far + 1, (), generator=generator)) for far in most)
    padded = F.pad(picture, (most[1], most[1], most[0], most[0]))
    return padded[:, down : down + height, right : right + width]


def _cut(picture: Tensor, generator: torch.Generator) -> Tensor:
    height, width = picture.shape[-2:]
    sides = [int(side * _CUT + 0.5) for side in (height, width)]
    # the square's middle may lie anywhere, so that it also leaves the picture
    top, left = (int(torch.randint(side + 1, (), generator=generator)) for side in (height, width))
    mask = torch.ones(1, height, width, device=picture.device)
    rows, columns = (
        slice(max(0, at - size // 2), max(0, at - size // 2 + size))
        for at, size in zip((top, left), sides, strict=True)
    )
    mask[:, rows, columns] = 0
    return picture * mask


def recoloured(pictures: Tensor, mix: Tensor, blend: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] with channels mixed by (n, 3, 3) matrices, as far as `blend` (n, 3) in [0, 1].

    Hybrid SD (arXiv 2408.06646): x' = blend clamp(mix x, 0, 1) + (1 - blend) x for x in [0, 1].
    """
    unit = (pictures + 1) / 2
    mixed = torch.einsum("nij,njhw->nihw", mix, unit).clamp(0, 1)
    share = blend[:, :, None, None]
    return (share * mixed + (1 - share) * unit) * 2 - 1


def worst_half(pictures: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`pictures` white where `first` and `second` differ by less than the median over the batch: what is learnt stays
    out of the way of what is not (Hybrid SD's filter of pixels)."""
    error = (first - second).abs().mean(1, keepdim=True)
    return torch.where(error < error.median(), torch.ones((), device=pictures.device), pictures)


def last_weight(decoder: Any) -> Tensor:
    """The weight of a decoder's last convolution."""
    found: Tensor = [layer.weight for layer in decoder.modules() if isinstance(layer, nn.Conv2d)][-1]
    return found
